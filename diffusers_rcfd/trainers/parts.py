"""Finished parts of a job: verified before they are built on, and loaded alike by every session of a run."""

from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch

from diffusers_rcfd.saving import CHECKSUMS_FILE, find_damage, listed_files
from diffusers_rcfd.trainers.checkpoints import (
    STATE_FILE,
    find_checkpoint_damage,
    find_checkpoints,
    find_fault,
    read_state,
)
from diffusers_rcfd.trainers.made_files import MADE_FILE, find_changed

Model = TypeVar("Model")


def load_part(cls: type[Model], folder: Path) -> Model:
    """Load a model that a part of a run has saved, into memory of its own.

    Weights that stay in memory after training, and weights that are mapped from a file, lie at other addresses, by
    which kernels round otherwise. A run that was stopped between two parts would therefore not repeat one that was
    not. Each part hands on what its file holds, copied.

    Args:
        cls (`type`): the class, with a `from_pretrained`.
        folder (`Path`): where it was saved.

    Returns:
        the model, in eval mode.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if a file of it is not what was written.
    """
    check_model(folder)
    model = cls.from_pretrained(str(folder))
    modules = [model] if isinstance(model, torch.nn.Module) else model.components.values()
    for module in modules:
        if isinstance(module, torch.nn.Module):
            copy_weights(module.eval())
    return model


def copy_weights(network: torch.nn.Module) -> None:
    """Move each weight and buffer of a network to memory that is allocated for it alone."""
    for tensor in chain(network.parameters(), network.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def check_model(folder: Path) -> None:
    """Raise if a saved model is not what was written: see `load_part`. Version 0.1 wrote nothing to tell it by."""
    folder = Path(folder)
    remedy = "resume from an earlier checkpoint by its name, or begin anew with `overwrite_output_dir`"
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r}, which this run has saved, is missing: put it back, {remedy}.")
    if faults := _find_model_faults(folder):
        raise ValueError(f"{str(folder)!r} {faults[0]}: put it back, {remedy}.")


def find_part_fault(folder: Path, made_by: dict[str, Any]) -> str | None:
    """Why a folder holds no finished part of a job that was made by these options; None if it does.

    Args:
        folder (`Path`): the `output_dir` of the part's trainer, whose model lies there.
        made_by (`dict`): of the trainer that would make it, see `Trainer.made_by`.
    """
    checkpoints = find_checkpoints(folder)
    if not checkpoints:
        return "has no checkpoint"
    if fault := find_fault(checkpoints[-1], made_by):
        return f"cannot be built on: {checkpoints[-1].name} {fault}"
    if read_state(checkpoints[-1]).step:
        return f"is not finished: it has come to {checkpoints[-1].name}"
    return next(iter(_find_model_faults(folder)), None)


def verify(folder: Path) -> list[str]:
    """What is wrong with all that runs have written in a folder and those below: each file against its checksum.

    Args:
        folder (`Path`): the folder of a run, a job, a checkpoint or a saved model.

    Returns:
        `list[str]`: faults, each with the folder's name; empty if nothing is wrong.

    Raises:
        FileNotFoundError: if there is nothing that can be verified.
    """
    kinds = {STATE_FILE: _find_checkpoint_faults, CHECKSUMS_FILE: _find_model_faults, MADE_FILE: _find_run_faults}
    lists = sorted(path for path in Path(folder).rglob("*.json") if path.name in kinds)
    if not lists:
        raise FileNotFoundError(f"`folder` must hold a run, a checkpoint or a saved model, got {str(folder)!r}.")
    return [f"{path.parent} {fault}" for path in lists for fault in kinds[path.name](path.parent)]


def _find_model_faults(folder: Path) -> list[str]:
    return _or_damaged_list(lambda: find_damage(folder, listed_files(folder)))


def _find_run_faults(folder: Path) -> list[str]:
    return _or_damaged_list(lambda: find_changed(folder))


def _find_checkpoint_faults(folder: Path) -> list[str]:
    return [fault for fault in [find_checkpoint_damage(folder)] if fault]


def _or_damaged_list(find_faults) -> list[str]:
    """The faults found, or that the list to find them by is damaged itself."""
    try:
        return find_faults()
    except ValueError as error:
        return [f"is damaged: {error}"]
