"""Whether the settings of publishing fit each other.

check_publish(config, world_size=2)
"""

from typing import get_args

from weightcast.sync import DeltaMode, kind_of
from weightcast.sync.errors import ConfigError
from weightcast.sync.quantize_rules import KINDS
from weightcast.sync.transports.servers import choose_kinds
from weightcast.trainer.checks.common import check_choice, check_positive
from weightcast.trainer.config import ConfigContainer, PublishConfig, delta_mode, parse_policy

QUANTIZE = ("none", *KINDS)
OF_STORES = ("anchor_every", "keep", "key_file", "config_from")


def check_publish(config: ConfigContainer, world_size: int) -> None:
    """Settings of publishing fit each other."""
    check_positive(
        {
            "publish.every": config.publish.every,
            "publish.wait_timeout_s": config.publish.wait_timeout_s,
            "publish.timeout_s": config.publish.timeout_s,
        }
    )
    publish = config.publish
    _check_place(publish)
    _check_reaches(publish)
    if publish.wait_for < 0:
        raise ConfigError(f"publish.wait_for={publish.wait_for} is a number of engines, 0 or more")
    if publish.wait_for and publish.to is None:
        raise ConfigError("publish.wait_for is set and publish.to is not: say at which address engines subscribe")
    check_choice("publish.quantize", publish.quantize, QUANTIZE)
    if publish.quantize != "none" and publish.to is None:
        raise ConfigError("publish.quantize is set and publish.to is not: say at which address engines subscribe")
    told_of_adapter = publish.peft == "adapter" and not publish.modules_to_not_convert
    given = publish.modules_to_not_convert or publish.engine_config is not None
    if publish.quantize == "none" and given and not told_of_adapter:
        raise ConfigError(
            "publish.modules_to_not_convert and publish.engine_config are for quantised publishing: set "
            "publish.quantize to fp8_block or fp8_tensor, or leave them out"
        )
    if publish.hold_next_step and not publish.overlap:
        raise ConfigError("publish.hold_next_step is a way to overlap: set publish.overlap=true too, or leave it out")
    if publish.to is not None and kind_of(publish.to) == "publisher" and publish.to.endswith(":0") and world_size > 1:
        raise ConfigError(f"publish.to={publish.to!r}: all ranks need the same address, so name a port that is free")
    if delta_mode(publish) not in get_args(DeltaMode):
        raise ConfigError(f"publish.delta={publish.delta!r} is not known; use one of {', '.join(get_args(DeltaMode))}")
    told = [name for name in ("report_log", "metrics_port") if getattr(publish, name) is not None]
    if told and publish.to is None:
        raise ConfigError(f"publish.{told[0]} is set and publish.to is not: without versions there are no reports")
    if publish.metrics_port is not None and not 0 <= publish.metrics_port <= 65535:
        raise ConfigError(
            f"publish.metrics_port={publish.metrics_port} is no port; use 1 to 65535, or 0 for a free one"
        )


def _check_reaches(publish: PublishConfig) -> None:
    """How engines may read versions by themselves."""
    if publish.expose is None and not publish.in_place:
        return
    name = "publish.expose" if publish.expose is not None else "publish.in_place"
    if publish.to is None:
        raise ConfigError(f"{name} is set and publish.to is not: say at which address engines subscribe")
    if kind_of(publish.to) == "store":
        raise ConfigError(
            f"{name} does not apply to {publish.to}: engines read a store's files. Publish to an address such as "
            "tcp://127.0.0.1:5600, or leave it out"
        )
    try:
        choose_kinds(publish.expose, publish.to, None)
    except ConfigError as error:
        raise ConfigError(f"publish.expose={publish.expose}: {error}") from None
    if not publish.in_place:
        return
    if delta_mode(publish) != "off":
        raise ConfigError(
            f"publish.in_place=true with publish.delta={delta_mode(publish)}: the parameters are read where they lie, "
            "and nothing is kept to compare with; set publish.delta=off, or leave it out"
        )
    if publish.overlap and not publish.hold_next_step:
        raise ConfigError(
            "publish.overlap=true with publish.in_place=true: no copy is made that training could go on from. Set "
            "publish.hold_next_step=true, which holds the next optimizer step back until the fleet serves, or leave "
            "overlap out"
        )


def _check_place(publish: PublishConfig) -> None:
    """Settings that belong to the other kind of place are refused by name."""
    of_stores = [name for name in OF_STORES if getattr(publish, name) is not None]
    if publish.policy is not None:
        if publish.to is None:
            raise ConfigError("publish.policy is set and publish.to is not: say where engines find versions")
        parse_policy(publish.policy)
    check_positive({"publish.anchor_every": publish.anchor_every, "publish.keep": publish.keep})
    if publish.to is None or kind_of(publish.to) == "publisher":
        if of_stores:
            raise ConfigError(
                f"publish.{of_stores[0]} is for a store of versions: set publish.to to a folder or URL, or leave it out"
            )
        return
    if publish.overlap:
        raise ConfigError(
            f"publish.overlap does not apply to {publish.to}: a version is written into a store before training goes "
            "on. Leave it out, or publish to an address such as tcp://127.0.0.1:5600"
        )
    if publish.wait_for and publish.policy is None:
        raise ConfigError(
            f"publish.wait_for={publish.wait_for}: who follows {publish.to} is not known without a policy. Set "
            "publish.policy=all, or leave it out"
        )
