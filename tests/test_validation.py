"""Tests of diffusers_rcfd.validation: what a value of each type may be, and what it becomes."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_rcfd.validation import (
    document_options,
    is_count,
    is_number,
    normalize,
    option,
    require,
    require_count,
    to_integer,
    to_number,
    to_text,
)


@document_options
@dataclass
class Options:
    """Options of a test."""

    count: int = option(1, "How many.")
    share: float = option(0.5, "Which share.")
    name: str = option("x", "What it is called.")
    flag: bool = option(False, "Whether.")
    counts: list[int] | None = option(None, "How many of each.")
    shares: list[float] = option([0.5], "Which shares.")

    def __post_init__(self):
        normalize(self)


@document_options
@dataclass
class MoreOptions(Options):
    """More of them."""

    last: str | None = option(None, "What comes last.")


INTEGERS = [4, np.int64(4), np.uint8(4), np.array(4), torch.tensor(4)]
NO_INTEGERS = [True, np.True_, 4.0, np.float64(4), "4", None, [4], b"4"]
NUMBERS = [(0.5, 0.5), (2, 2.0), (np.float64(0.5), 0.5), (np.float32(0.5), 0.5), (np.int8(2), 2.0), ("1e-4", 1e-4),
           ("9e-1", 0.9), ("2", 2.0), (Fraction(1, 2), 0.5)]  # fmt: skip
NO_NUMBERS = [True, np.True_, "", "half", "nan", "1e999", float("nan"), float("inf"), 10**400, None, [0.5], 1j, b"1"]


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_integers(value):
    assert type(to_integer(value)) is int and to_integer(value) == 4
    assert is_count(value, 4) and not is_count(value, 5)
    assert type(require_count("count", value, 1)) is int
    assert type(Options(count=value).count) is int
    with pytest.raises(ValueError, match="`count` must be an integer of at least 5, got"):
        require_count("count", value, 5)


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_no_integers(value):
    assert to_integer(value) is None and not is_count(value)
    with pytest.raises(ValueError, match="`count` must be an integer, got"):
        Options(count=value)
    with pytest.raises(ValueError, match="`count` must be an integer of at least 1, got"):
        require_count("count", value, 1)


@pytest.mark.parametrize("value, number", NUMBERS, ids=repr)
def test_numbers(value, number):
    assert type(to_number(value)) is float and to_number(value) == number
    assert Options(share=value).share == number and Options(shares=[value, 1]).shares == [number, 1.0]
    assert is_number(value) != isinstance(value, str)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_no_numbers(value):
    assert to_number(value) is None
    with pytest.raises(ValueError, match="`share` must be a finite number, got"):
        Options(share=value)


def test_text_and_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, text in (("a b", "a b"), (Path("a"), "a"), ("~/a", str(tmp_path / "a")), (Path("~"), str(tmp_path))):
        assert to_text(value) == text and type(Options(name=value).name) is str
    for value in (b"a", 1, None, True, ["a"]):
        with pytest.raises(ValueError, match="`name` must be text or a path, got"):
            Options(name=value)
    for value in (1, "yes", None, 0.0):
        with pytest.raises(ValueError, match="`flag` must be True or False, got"):
            Options(flag=value)


@pytest.mark.parametrize("value", [[4, 2], (4, 2), np.array([4, 2]), torch.tensor([4, 2]), range(4, 0, -2)], ids=repr)
def test_lists(value):
    assert Options(counts=value).counts == [4, 2]


def test_one_value_is_a_list_of_one():
    assert Options(counts=np.int64(4)).counts == [4] and Options(shares="1e-1").shares == [0.1]
    assert Options(counts=None).counts is None
    for value in ({4: 2}, {4}, "4", [4, 2.5], [None], b"4"):
        with pytest.raises(ValueError, match="`counts` must be an integer, got"):
            Options(counts=value)


def test_message():
    require(True, "share", 1, "at most 1")
    with pytest.raises(ValueError, match="^`share` must be at most 1, got 2.$"):
        require(False, "share", 2, "at most 1")


def test_docstring():
    assert Options.__doc__ == (
        "Options of a test.\n"
        "\n"
        "Args:\n"
        "    count (`int`, defaults to `1`): How many.\n"
        "    share (`float`, defaults to `0.5`): Which share.\n"
        "    name (`str`, defaults to `'x'`): What it is called.\n"
        "    flag (`bool`, defaults to `False`): Whether.\n"
        "    counts (`list[int]`, *optional*): How many of each.\n"
        "    shares (`list[float]`, defaults to `[0.5]`): Which shares."
    )
    own, inherited = MoreOptions.__doc__.split("    last (`str`, *optional*): What comes last.\n")
    assert own == "More of them.\n\nArgs:\n" and inherited == Options.__doc__.split("Args:\n")[1]
