"""Whether the settings of adapters fit each other, the publisher and the checkpoints.

check_peft(config)
"""

import difflib
from dataclasses import fields

from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks.common import check_choice
from weightcast.trainer.config import ConfigContainer, PeftConfig

SCHEMES = ("lora", "canonical_lora", "dora")
PUBLISHED = ("merged", "adapter")


def check_peft(config: ConfigContainer) -> None:
    """Settings of adapters are in range, and none is set that has no effect."""
    peft = config.peft
    check_choice("publish.peft", config.publish.peft, PUBLISHED)
    if not peft.is_used:
        _check_unused(config)
        return
    if peft.scheme is not None:
        check_scheme(peft.scheme)
    if peft.dim < 1:
        raise ConfigError(f"peft.dim={peft.dim} is the rank of the update; it must be at least 1")
    if not 0 <= peft.dropout < 1:
        raise ConfigError(f"peft.dropout={peft.dropout} is a probability; it must be at least 0 and below 1")
    check_choice("peft.dropout_position", peft.dropout_position, ("pre", "post"))
    check_choice("peft.lora_A_init_method", peft.lora_A_init_method, ("xavier", "kaiming", "zero"))
    if peft.scheme == "dora" and peft.dropout_position != "pre":
        raise ConfigError("peft.dropout_position=post: DoRA drops inputs only; leave it at pre")
    if peft.options and not is_own(peft.scheme):
        raise ConfigError(f"peft.options is for a scheme of your own (module:function), not for {peft.scheme}")
    if is_own(peft.scheme):
        _check_own(config)
    if config.publish.peft == "adapter" and config.publish.to is None:
        raise ConfigError("publish.peft is set and publish.to is not: say at which address engines subscribe")
    if config.publish.peft == "adapter" and config.publish.quantize != "none":
        raise ConfigError("publish.quantize is for whole weights: set publish.peft=merged, or publish.quantize=none")


def check_scheme(scheme: str) -> None:
    """Raise `ConfigError` unless it is one of ours or has the form of a user's."""
    if scheme in SCHEMES or is_own(scheme):
        return
    near = difflib.get_close_matches(scheme.lower(), SCHEMES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"peft.scheme={scheme!r} is not known; {hint}there are {', '.join(SCHEMES)}, and module:function for your own"
    )


def is_own(scheme: str | None) -> bool:
    """Whether the scheme names a user's method."""
    module, colon, function = (scheme or "").partition(":")
    return bool(module and colon and function)


def _check_own(config: ConfigContainer) -> None:
    for name, value in (
        ("peft.load_adapter", config.peft.load_adapter),
        ("peft.export_adapter", config.peft.export_adapter),
        ("publish.peft=adapter", config.publish.peft == "adapter" or None),
    ):
        if value is not None:
            raise ConfigError(f"{name} needs LoRA or DoRA, which PEFT folders can hold, not {config.peft.scheme}")


def _check_unused(config: ConfigContainer) -> None:
    plain = PeftConfig()
    given = [item.name for item in fields(plain) if getattr(config.peft, item.name) != getattr(plain, item.name)]
    if given:
        raise ConfigError(
            f"peft.{given[0]} is set and peft.scheme is not, so all weights would train: set peft.scheme to one of "
            f"{', '.join(SCHEMES)}, or leave peft.{given[0]} out"
        )
    if config.publish.peft != "merged":
        raise ConfigError(f"publish.peft={config.publish.peft} needs adapters: set peft.scheme, or leave it at merged")
