"""Checks of what a user gives: one way to coerce and check a value, one form of message. Free of torch."""

import inspect
import math
import operator
import os
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from numbers import Real
from types import NoneType
from typing import Any, get_args, get_origin


def option(default: Any, help: str) -> Any:
    """A dataclass field with its documentation."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raise the `ValueError` of a field whose value is not allowed."""
    if not condition:
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")


def require_count(name: str, value: Any, least: int) -> int:
    """Return an argument as an `int`; raise its `ValueError` if it is not an integer of at least `least`."""
    integer = to_integer(value)
    require(integer is not None and integer >= least, name, value, f"an integer of at least {least}")
    return integer


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be compared, which a bool and NaN are not."""
    return isinstance(value, Real) and not isinstance(value, bool) and value == value


def is_count(value: Any, minimum: int = 0) -> bool:
    """Whether a value is an integer of at least `minimum`, numpy's included; a bool is not."""
    integer = to_integer(value)
    return integer is not None and integer >= minimum


def to_integer(value: Any) -> int | None:
    """Return an integer, numpy's included, as an `int`; None for anything else, a bool included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def to_number(value: Any) -> float | None:
    """Return a finite number, or text of one such as YAML's "1e-4", as a `float`; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def to_text(value: Any) -> str | None:
    """Return text or a path as a `str`, with a leading `~` replaced by the home; None for anything else."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    return os.path.expanduser(path) if isinstance(path, str) else None


def to_truth_value(value: Any) -> bool | None:
    """Return True or False; None for anything else."""
    return value if isinstance(value, bool) else None


# Type of an option: how its value is coerced, and what a message says is allowed.
KINDS: dict[type, tuple[Callable[[Any], Any], str]] = {
    bool: (to_truth_value, "True or False"),
    int: (to_integer, "an integer"),
    float: (to_number, "a finite number"),
    str: (to_text, "text or a path"),
}


def normalize(config: Any) -> None:
    """Coerce each field of a config to its declared type, in place.

    Integers may be numpy's, numbers may be numpy's or text, text may be an `os.PathLike` or begin with `~`. A field
    that takes a list also takes a tuple, an array, or one value alone.

    Raises:
        ValueError: if a value is not of the type of its field; the message names the field.
    """
    for each in fields(config):
        setattr(config, each.name, _coerce(each.name, each.type, getattr(config, each.name)))


def _coerce(name: str, kind: Any, value: Any) -> Any:
    """Return a value as the type that an annotation such as `int`, `str | None` or `list[float] | None` declares."""
    if NoneType in get_args(kind):
        if value is None:
            return None
        kind = get_args(kind)[0]
    if get_origin(kind) is list:
        (element,) = get_args(kind)
        return [_coerce(name, element, each) for each in _to_list(value)]
    if kind not in KINDS:
        return value
    convert, allowed = KINDS[kind]
    coerced = convert(value)
    require(coerced is not None, name, value, allowed)
    return coerced


def _to_list(value: Any) -> list:
    """Return a sequence or an array as a list, and one value as a list of it."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, (list, tuple, range)) else [value]


def document_options(cls: type) -> type:
    """Append an `Args` section to the docstring of a config, made from its fields; a class decorator.

    The options that the class declares itself come first.
    """
    by_name = {each.name: each for each in fields(cls)}
    ordered = {name: by_name[name] for name in inspect.get_annotations(cls)} | by_name
    entries = "\n".join(_document_option(each) for each in ordered.values())
    cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or cls.__name__)}\n\nArgs:\n{entries}"
    return cls


def _document_option(each: Field) -> str:
    """Return the entry of a field in an `Args` section."""
    default = each.default if each.default_factory is MISSING else each.default_factory()
    kinds = [kind for kind in get_args(each.type) or (each.type,) if kind is not NoneType]
    kind = inspect.formatannotation(each.type if get_origin(each.type) is list else kinds[0])
    about = "*optional*" if default is None else f"defaults to `{default!r}`"
    entry = f"{each.name} (`{kind}`, {about}): {each.metadata.get('help', '')}"
    return textwrap.fill(entry, 115, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False)
