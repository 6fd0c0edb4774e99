"""Checks of an algorithm's options."""

from evosearch.errors import ConfigError

__all__ = ["check_range"]


def check_range(
    name: str, value: float, low: float, high: float, *, open_below: bool = False
) -> None:
    """Checks that `search.options.NAME` lies between two bounds.

    Raises:
        ConfigError: It does not; names the option, the bounds and the value.
    """
    if not (low < value if open_below else low <= value) or not value <= high:
        bracket = "(" if open_below else "["
        raise ConfigError(f"search.options.{name} must lie in {bracket}{low}, {high}], got {value}")
