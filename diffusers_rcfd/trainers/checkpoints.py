"""Where a run stands, and the checkpoints that say so: written whole or not at all, and checked before use."""

import json
import math
import os
import re
import shutil
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from safetensors.torch import load_file, save_file

from diffusers_rcfd.saving import find_damage, kind_of, list_files, read_checked, write_checked, write_whole
from diffusers_rcfd.trainers.config import TrainingConfig
from diffusers_rcfd.trainers.lock import LOCK_FILE
from diffusers_rcfd.trainers.made_files import (
    MADE_FILE,
    delete_files,
    delete_models_and_files,
    find_foreign,
    forget_checkpoint,
    note_made,
    read_made,
    seal_made,
)
from diffusers_rcfd.trainers.run_record import find_differences

logger = logging.get_logger(__name__)

STATE_FILE = "trainer_state.json"
EMA_FILE = "ema.safetensors"
METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.json"
FOLDERS = re.compile(r"samples|best|unet|scheduler|\d+-step")  # that a run makes in its `output_dir`


@dataclass
class TrainerState:
    """Where a run stands, as saved in a checkpoint: `step` counts within the stage, `global_step` over all."""

    stage: int = 0
    step: int = 0
    global_step: int = 0
    seconds: float = 0.0  # of training, over all sessions
    best: float | None = None  # score of the stage's best evaluation, higher is better
    taken: int = 0  # optimizer steps of the stage that were not skipped
    skipped_in_a_row: int = 0  # up to here
    # Of each process: the sums of the loss terms since the last line of metrics.
    windows: list[dict[str, float]] = field(default_factory=list)
    # Of a streaming data set, for each process: the epoch it reads, and the stage's batches before that epoch.
    streams: list[list[int]] = field(default_factory=list)


def window_of(state: TrainerState, process: int, processes: int) -> dict[str, float]:
    """A process's sums since the last line of metrics; the mean of all where another number of them had saved."""
    if len(state.windows) in (0, processes):
        return state.windows[process] if state.windows else {}
    names = state.windows[0]
    return {name: sum(window[name] for window in state.windows) / len(state.windows) for name in names}


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first: those that were renamed after their last file was written."""
    found = [path.parent for path in Path(output_dir).glob(f"checkpoint-*/{STATE_FILE}")]
    return sorted((path for path in found if _step(path).isdecimal()), key=lambda path: int(_step(path)))


def _step(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("checkpoint-")


def check_output_dir(config: TrainingConfig) -> None:
    """Check that `output_dir` may be used, as far as can be told before anything is loaded.

    Raises:
        ValueError: if it, or what is to be a folder in it, is none; if it is not empty and neither resumed from nor
            overwritten; or if it holds no checkpoint to resume from, but files that no run of this package has made.
        FileNotFoundError: if `resume_from_checkpoint` names no checkpoint.
    """
    output_dir, resume = Path(config.output_dir), config.resume_from_checkpoint
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"`output_dir` must be a folder, got the {kind_of(output_dir)} {str(output_dir)!r}.")
    if resume not in (None, "latest") and not (Path(resume) / STATE_FILE).is_file():
        raise FileNotFoundError(
            f"`resume_from_checkpoint` must name a whole checkpoint; {resume!r} lacks {STATE_FILE}."
        )
    if not output_dir.exists():
        return
    for path in output_dir.iterdir():
        if FOLDERS.fullmatch(path.name) and kind_of(path) != "folder":
            raise ValueError(f"{str(path)!r} must be a folder, it is a {kind_of(path)}.")
    if config.overwrite_output_dir:
        return
    if resume is None and any(path.name != LOCK_FILE for path in output_dir.iterdir()):
        raise ValueError(
            f"`output_dir` must be an empty folder, got {str(output_dir)!r}: choose another, or pass "
            "`overwrite_output_dir` or `resume_from_checkpoint='latest'`."
        )
    if resume == "latest" and not _has_checkpoint(output_dir) and (foreign := find_foreign(output_dir)):
        raise ValueError(
            f"`output_dir` must be empty or hold a run to resume, got {str(output_dir)!r} with {foreign[0]!r}: choose "
            "another, or pass `overwrite_output_dir`, which leaves such files where they are."
        )


def _has_checkpoint(output_dir: Path) -> bool:
    """Whether a folder, or a part of a job in it, has a checkpoint."""
    return bool(find_checkpoints(output_dir)) or any(map(find_checkpoints, output_dir.glob("*/")))


def choose_checkpoint(config: TrainingConfig, made_by: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from: the one that is named, or the latest that is whole; or None.

    Args:
        config (`TrainingConfig`): `output_dir` and `resume_from_checkpoint`.
        made_by (`dict`): what a checkpoint must have been made by, see `Trainer.made_by`.

    Raises:
        ValueError: if the one that is named, or each that there is, is damaged, or if it is of another run.
    """
    check_output_dir(config)
    if config.resume_from_checkpoint is None:
        return None
    latest = config.resume_from_checkpoint == "latest"
    candidates = find_checkpoints(config.output_dir)[::-1] if latest else [Path(config.resume_from_checkpoint)]
    faults = []
    for checkpoint in candidates:
        damage = find_checkpoint_damage(checkpoint)
        fault = damage or find_other_maker(checkpoint, made_by)
        if fault is None:
            for message in faults:
                warnings.warn(f"Passed over for {checkpoint.name}: {message}.", stacklevel=2)
            return checkpoint
        faults.append(f"{checkpoint} {fault}")
        if damage is None:  # an earlier one would go on without what the run has learned since
            break
    if faults:
        raise ValueError(
            f"`resume_from_checkpoint` must name a whole checkpoint of this run, got "
            f"{config.resume_from_checkpoint!r}: {'; '.join(faults)}. `overwrite_output_dir` alone begins anew."
        )
    return None


def find_fault(checkpoint: Path, made_by: dict[str, Any]) -> str | None:
    """Why a checkpoint cannot be resumed from, to be read after its name; None if it can."""
    return find_checkpoint_damage(checkpoint) or find_other_maker(checkpoint, made_by)


def find_other_maker(checkpoint: Path, made_by: dict[str, Any]) -> str | None:
    """What says that a whole checkpoint is of another run, to be read after its name; None if nothing does."""
    refused, _ = _differences(checkpoint, made_by)
    differences = "; ".join(f"its {name} is {was}, not {now}" for name, (was, now) in refused.items())
    return f"is of another run: {differences}" if refused else None


def find_changes(checkpoint: Path, made_by: dict[str, Any]) -> dict[str, tuple]:
    """What is otherwise in a run that goes on from a checkpoint, and may be: (old, new) by name. It is logged."""
    _, changed = _differences(checkpoint, made_by)
    for name, (was, now) in changed.items():
        logger.warning(f"From {checkpoint.name} on `{name}` is {now}, it was {was}.")
    if "options" not in read_checked(checkpoint / STATE_FILE)["made_by"]:
        logger.warning(f"{checkpoint} is of version 0.1: its options, data and teacher are taken as unchanged.")
    return changed


def _differences(checkpoint: Path, made_by: dict[str, Any]) -> tuple[dict[str, tuple], dict[str, tuple]]:
    record, state = read_checked(checkpoint / STATE_FILE), read_state(checkpoint)
    return find_differences(record["made_by"], json.loads(json.dumps(made_by)), state.stage, state.step)


def find_checkpoint_damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, to be read after its name; None if nothing is."""
    try:
        files = read_checked(checkpoint / STATE_FILE)["files"]
        read_state(checkpoint)
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"is damaged: {error}"
    return next(iter(find_damage(checkpoint, files)), None)


def architecture(model: torch.nn.Module) -> dict[str, Any]:
    """The config of a network as entries of `Trainer.made_by`; its dropout may change."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_") and name != "dropout"}
    return {f"network.{name}": value for name, value in config.items()}


def open_output_dir(accelerator: Accelerator, config: TrainingConfig, made_by: dict[str, Any]) -> Path | None:
    """Choose the checkpoint to resume from, or None, and bring `output_dir` to where that stands.

    Where a run begins, all that an earlier run in `output_dir` has listed as its own is deleted. Where it goes on,
    later lines of the metrics are cut off; later checkpoints, such as damaged ones, are renamed to `unused-*`.
    Raises as `check_output_dir` and `choose_checkpoint` do.
    """
    output_dir, checkpoint = Path(config.output_dir), choose_checkpoint(config, made_by)
    accelerator.wait_for_everyone()  # nobody writes before everyone has looked
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            delete_run(output_dir)
        else:
            _return_to(checkpoint, output_dir)
        note_made(output_dir, files=(METRICS_FILE,))
    accelerator.wait_for_everyone()
    return checkpoint


def delete_run(output_dir: Path) -> None:
    """Delete what a run has listed as its own; of version 0.1, which had no list, the checkpoints.

    Files of others stay. What is in the way, as the metrics of version 0.1, is renamed to `unused-*`.

    Raises:
        ValueError: if what is not the run's own lies where a checkpoint is to be.
    """
    made = _read_made_or_warn(output_dir)
    names = {*made["checkpoints"], *(path.name for path in find_checkpoints(output_dir) if _is_ours(path))}
    for path in sorted(output_dir.glob("*checkpoint-*")):
        of_a_run = path.name.removeprefix("partial-") in names and not path.is_symlink()
        if re.fullmatch(r"(partial-)?checkpoint-\d+", path.name) and not of_a_run:
            raise ValueError(
                f"`output_dir` must have no {path.name} that is not of a run of this package, got "
                f"{str(output_dir)!r}: move it away, or choose another folder."
            )
    for name in names:
        for checkpoint in (output_dir / f"partial-{name}", output_dir / name):
            delete_checkpoint(checkpoint)
            _set_aside(checkpoint)
        if _is_ours(unused := output_dir / f"unused-{name}"):
            delete_checkpoint(unused)
    delete_models_and_files(output_dir)
    for name in (METRICS_FILE, EVALUATION_FILE):
        _set_aside(output_dir / name)


def _set_aside(path: Path) -> None:
    """Rename what lies at a place to `unused-*`, if there is something, over nothing of others."""
    unused, number = path.with_name(f"unused-{path.name}"), 1
    if _is_ours(unused):
        delete_checkpoint(unused)
    while os.path.lexists(unused):
        number += 1
        unused = path.with_name(f"unused-{path.name}-{number}")
    if os.path.lexists(path):
        path.rename(unused)


def _read_made_or_warn(output_dir: Path) -> dict[str, Any]:
    """What a run has made; where its list is damaged, nothing, and the list is renamed to `unused-made.json`."""
    try:
        return read_made(output_dir)
    except ValueError as error:
        warnings.warn(f"{output_dir}: {error}: what it listed is left where it is.", stacklevel=2)
        (output_dir / MADE_FILE).rename(output_dir / f"unused-{MADE_FILE}")
        return read_made(output_dir)


def _return_to(checkpoint: Path, output_dir: Path) -> None:
    """Set later checkpoints aside and cut off later metrics."""
    made, reached = _read_made_or_warn(output_dir), read_state(checkpoint).global_step
    for name in made["checkpoints"]:
        delete_checkpoint(output_dir / f"partial-{name}")
        _forget(output_dir / name)
    for later in find_checkpoints(output_dir):
        if int(_step(later)) > reached and (later.name in made["checkpoints"] or _is_ours(later)):
            _set_aside(later)
    metrics = output_dir / METRICS_FILE
    if METRICS_FILE not in made["files"] and checkpoint.resolve().parent != output_dir.resolve():
        _set_aside(metrics)  # of another run, whose checkpoint lies elsewhere
    if metrics.exists():
        kept = [line for line in metrics.read_text(errors="replace").splitlines(True) if _step_of(line) <= reached]
        write_whole(metrics, "".join(kept))


def _step_of(line: str) -> float:
    """The global step of a line of metrics; infinity of one that is damaged, or that a kill has cut short."""
    try:
        return json.loads(line)["global_step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        warnings.warn(f"{METRICS_FILE} has a damaged line, which is left out: {line[:80]!r}.", stacklevel=2)
        return math.inf


def _is_ours(checkpoint: Path) -> bool:
    """Whether a folder, and no link to one, holds the state file of a checkpoint of this package."""
    try:
        return not checkpoint.is_symlink() and "made_by" in read_checked(checkpoint / STATE_FILE)
    except (ValueError, OSError):
        return False


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete the files that a checkpoint lists, and the folder if nothing is left in it; no link is followed.

    One that was never whole lists nothing: it is deleted with all that is in it. Call this only for a checkpoint that
    the run has listed as its own, or that has a list.
    """
    if checkpoint.is_symlink() or not checkpoint.is_dir():
        return
    try:
        files = read_checked(checkpoint / STATE_FILE)["files"]
    except (ValueError, KeyError, OSError):
        shutil.rmtree(checkpoint)
        return
    delete_files(checkpoint, [*files, STATE_FILE])  # the list last, so that a kill leaves it
    with suppress(OSError):  # somebody else's file is in it
        checkpoint.rmdir()


def read_state(checkpoint: Path) -> TrainerState:
    """Where the run stood that wrote a checkpoint."""
    record = read_checked(checkpoint / STATE_FILE)
    return TrainerState(**{field.name: record[field.name] for field in fields(TrainerState) if field.name in record})


def save_checkpoint(
    accelerator: Accelerator,
    state: TrainerState,
    ema: EMAModel | None,
    config: TrainingConfig,
    made_by: dict[str, Any],
) -> Path:
    """Write a checkpoint beside its final place, then rename it; older ones go once it is safe. On every process.

    Its `trainer_state.json`, written last, lists every file with its size and checksum. All that the run has written
    is on the disk, not only on its way there, before the name says that it is whole.

    Args:
        accelerator (`Accelerator`): holds the model, optimizer and schedule; at step 0 of a stage nothing of them.
        state (`TrainerState`): where the run stands.
        ema (`EMAModel`, *optional*): the averaged weights.
        config (`TrainingConfig`): `output_dir`, and `checkpoints_total_limit` that are kept.
        made_by (`dict`): see `Trainer.made_by`.

    Returns:
        `Path`: `output_dir/checkpoint-{global_step}`.

    Raises:
        OSError: if it could not be written; nothing of it is left then, and those before it are as they were.
    """
    output_dir = Path(config.output_dir)
    folder = output_dir / f"checkpoint-{state.global_step}"
    partial = folder.with_name(f"partial-{folder.name}")
    try:
        if accelerator.is_main_process:
            _make_room(output_dir, folder)
            partial.mkdir()
        accelerator.wait_for_everyone()
        own = {"windows": state.windows, "streams": state.streams}
        own = {name: gather_object([values[accelerator.process_index]]) for name, values in own.items() if values}
        if state.step:
            accelerator.save_state(str(partial))
            if ema is not None:
                shadow = {str(i): full_tensor(value).contiguous() for i, value in enumerate(ema.shadow_params)}
                if accelerator.is_main_process:
                    save_file(shadow, partial / EMA_FILE)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = list_files(partial, [path for path in partial.rglob("*") if path.is_file()])
            write_checked(partial / STATE_FILE, asdict(state) | own | {"made_by": made_by, "files": files})
            seal_made(output_dir)
            flush(output_dir)
    except Exception as error:  # a full disk is an OSError, a RuntimeError or a SafetensorError
        if accelerator.is_main_process and not isinstance(error, FileExistsError):
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder} could not be written, the checkpoints before it are whole: {error}") from error
    if accelerator.is_main_process:
        delete_checkpoint(folder)  # of the same step, from before the run went back
        partial.rename(folder)
        flush(output_dir)
        mine = [path for path in find_checkpoints(output_dir) if _is_ours(path)]
        for old in mine[: -config.checkpoints_total_limit]:
            delete_checkpoint(old.rename(old.with_name(f"partial-{old.name}")))  # what a kill leaves is cleared
            _forget(old)
    return folder


def _forget(checkpoint: Path) -> None:
    """Take a checkpoint off the run's list if nothing is left of it."""
    if not any(os.path.lexists(checkpoint.with_name(form + checkpoint.name)) for form in ("", "partial-", "unused-")):
        forget_checkpoint(checkpoint.parent, checkpoint.name)


def _make_room(output_dir: Path, checkpoint: Path) -> None:
    """List a checkpoint as the run's own and delete what is left of an earlier one of the same step.

    Raises:
        FileExistsError: if something of others lies in its place.
    """
    partial = checkpoint.with_name(f"partial-{checkpoint.name}")
    if checkpoint.name not in read_made(output_dir)["checkpoints"]:
        for path in (checkpoint, partial):
            if os.path.lexists(path) and not _is_ours(path):
                raise FileExistsError(f"{str(path)!r} is in the way, a {kind_of(path)} that this run has not made")
        note_made(output_dir, checkpoints=[checkpoint.name])
    delete_checkpoint(partial)


def flush(folder: Path) -> None:
    """Have all that was written in a folder on the disk, files and names, as `fsync` does."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or (path.is_dir() and os.name == "posix"):
            with suppress(FileNotFoundError):  # of a tracker that tidies up
                descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)


def load_checkpoint(
    accelerator: Accelerator,
    checkpoint: Path,
    state: TrainerState,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
) -> None:
    """Put back what a checkpoint holds of the model, optimizer, schedule and averaged weights of a stage."""
    accelerator.load_state(str(checkpoint))
    for parameter, values in optimizer.state.items():
        for name, value in values.items():  # of a run with other `channels_last`; fused kernels look at no strides
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter).copy_(value)
    accelerator.step = 0  # of accumulation, which may be over another number of batches than before
    if ema is not None:
        saved = load_file(checkpoint / EMA_FILE)
        for i, shadow in enumerate(ema.shadow_params):
            shadow.copy_(_like(saved[str(i)].to(shadow.device), shadow))
        ema.optimization_step = state.step


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP2 may have spread over the processes, on each of them."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _like(value: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A whole tensor, spread over the processes as `model` is."""
    if not hasattr(model, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, model.device_mesh, model.placements)
