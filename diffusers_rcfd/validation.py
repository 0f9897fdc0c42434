"""Checks of what a user gives: one way to check a value, one form of message. Free of torch."""

import math
from dataclasses import field, fields
from os import PathLike
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field with its documentation."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raise the `ValueError` of a field whose value is not allowed."""
    if not condition:
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")


def require_count(name: str, value: int, least: int) -> None:
    """Raise the `ValueError` of an argument that is not an integer of at least `least`."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    require(integer and value >= least, name, value, f"an integer of at least {least}")


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be compared, which a bool and NaN are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def is_count(value: Any, minimum: int = 0) -> bool:
    """Whether a value is an integer of at least `minimum`, which a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def require_kinds(config: Any) -> None:
    """Raise the `ValueError` of a field that should be text, a truth value or finite, and is not."""
    for each in fields(config):
        name, kind, value = each.name, each.type, getattr(config, each.name)
        if kind is bool:
            require(isinstance(value, bool), name, value, "True or False")
        elif kind is str or (kind == str | None and value is not None):
            require(isinstance(value, (str, PathLike)), name, value, "text")
        for number in value if isinstance(value, (list, tuple)) else [value]:
            require(not isinstance(number, float) or not math.isinf(number), name, number, "finite")
