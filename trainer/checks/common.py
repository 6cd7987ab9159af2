"""What several checks say alike.

check_choice("optimizer.optimizer", config.optimizer.optimizer, ("adam",))
"""

from collections.abc import Mapping

from weightcast.sync.errors import ConfigError


def check_choice(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed`."""
    if value not in allowed:
        choices = ", ".join("null" if choice is None else choice for choice in allowed)
        raise ConfigError(f"{name}={value!r} is not one of: {choices}")


def check_positive(values: Mapping[str, float | None]) -> None:
    """Raise `ConfigError` for a value of 0 or less; null is let pass."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{name} is {value}; it must be more than 0")
