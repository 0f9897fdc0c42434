"""Reading weights of other code by name: what is missing, foreign or of another shape is named."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def check_tensors(state: Any, name: str) -> dict[str, torch.Tensor]:
    """The weights of a file, without the prefix that DataParallel gives every name.

    Raises:
        ValueError: for anything but a dict of tensors.
    """
    if not isinstance(state, dict) or not state:
        raise ValueError(f"`{name}` of the checkpoint must be a dict of tensors, got {type(state).__name__}.")
    if strange := [key for key, tensor in state.items() if not isinstance(tensor, torch.Tensor)]:
        raise ValueError(
            f"`{name}` of the checkpoint must hold tensors only, got something else at {shorten(strange)}."
        )
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def get_tensor(state: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """The tensor of a name.

    Raises:
        ValueError: if there is none.
    """
    if key not in state:
        raise ValueError(f"`checkpoint` has no tensor {key!r}: it is incomplete or of another network.")
    return state[key]


def load_tensors(model: nn.Module, tensors: dict[str, tuple[str, torch.Tensor]], theirs: dict[str, str]) -> None:
    """Fill every weight of a model, with none missing and none left over.

    Args:
        model (`nn.Module`): the model.
        tensors (`dict`): name in the model -> (name in the file, tensor).
        theirs (`dict`): name of a module in the model -> its name in the file, where it is known, for messages.

    Raises:
        ValueError: naming the tensors that are missing, foreign or of another shape.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    counters = {name for name in expected if name.endswith("num_batches_tracked")}  # of no effect, absent in old files
    missing = [name.rpartition(".") for name in sorted(expected.keys() - tensors.keys() - counters)]
    problems = {
        "not of this network": [key for name, (key, _) in tensors.items() if name not in expected],
        "missing": dict.fromkeys(f"{theirs.get(module, module)}.{parameter}" for module, _, parameter in missing),
        "of another shape": [
            f"{key} {tuple(tensor.shape)} instead of {tuple(expected[name])}"
            for name, (key, tensor) in tensors.items()
            if name in expected and tensor.shape != expected[name]
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{kind}: {shorten(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(f"`checkpoint` does not fit the {type(model).__name__} that its tensors describe. {text}.")
    model.load_state_dict({name: tensor for name, (_, tensor) in tensors.items()}, strict=False)  # checked above


def shorten(names: Iterable[Any], most: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
