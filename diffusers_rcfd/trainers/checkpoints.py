"""Where a run stands, and the checkpoints that say so: written whole or not at all, and checked before use."""

import json
import os
import shutil
import warnings
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from diffusers_rcfd.trainers.config import TrainingConfig

STATE_FILE = "trainer_state.json"
EMA_FILE = "ema.safetensors"
METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.json"


@dataclass
class TrainerState:
    """Where a run stands, as saved in a checkpoint: `step` counts within the stage, `global_step` over all."""

    stage: int = 0
    step: int = 0
    global_step: int = 0
    seconds: float = 0.0  # of training, over all sessions
    best: float | None = None  # score of the stage's best evaluation, higher is better
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
        ValueError: if it is not empty and neither resumed from nor overwritten.
        FileNotFoundError: if `resume_from_checkpoint` names no checkpoint.
    """
    output_dir, resume = Path(config.output_dir), config.resume_from_checkpoint
    if resume not in (None, "latest") and not (Path(resume) / STATE_FILE).is_file():
        raise FileNotFoundError(
            f"`resume_from_checkpoint` must name a whole checkpoint; {resume!r} lacks {STATE_FILE}."
        )
    if resume is None and not config.overwrite_output_dir and output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(
            f"`output_dir` must be an empty folder, got {str(output_dir)!r}: choose another, or pass "
            "`overwrite_output_dir` or `resume_from_checkpoint='latest'`."
        )


def choose_checkpoint(config: TrainingConfig, made_by: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from: the one that is named, or the latest that is whole and of this run; or None.

    Args:
        config (`TrainingConfig`): `output_dir` and `resume_from_checkpoint`.
        made_by (`dict`): what a checkpoint must have been made by, see `Trainer.made_by`.

    Raises:
        ValueError: if the one that is named, or each that there is, is damaged or of another run.
    """
    check_output_dir(config)
    if config.resume_from_checkpoint is None:
        return None
    latest = config.resume_from_checkpoint == "latest"
    candidates = find_checkpoints(config.output_dir)[::-1] if latest else [Path(config.resume_from_checkpoint)]
    faults = []
    for checkpoint in candidates:
        fault = find_fault(checkpoint, made_by)
        if fault is None:
            for message in faults:
                warnings.warn(f"Passed over for {checkpoint.name}: {message}.", stacklevel=2)
            return checkpoint
        faults.append(f"{checkpoint} {fault}")
    if faults:
        raise ValueError(
            f"`resume_from_checkpoint` must name a whole checkpoint of this run, got "
            f"{config.resume_from_checkpoint!r}: {'; '.join(faults)}. `overwrite_output_dir` alone begins anew."
        )
    return None


def find_fault(checkpoint: Path, made_by: dict[str, Any]) -> str | None:
    """Why a checkpoint cannot be resumed from, to be read after its name; None if it can."""
    try:
        record = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if record.pop("checksum") != zlib.crc32(json.dumps(record).encode()):
            return f"is damaged: {STATE_FILE} is not what was written"
        files, maker, state = record.pop("files"), record.pop("made_by"), TrainerState(**record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"is damaged: {STATE_FILE} cannot be read ({type(error).__name__}: {error})"
    for name, (size, checksum) in files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return f"is not whole: {name} has {path.stat().st_size if path.is_file() else 'none'} of {size} bytes"
        if _checksum(path) != checksum:
            return f"is damaged: {name} is not what was written"
    wanted = json.loads(json.dumps(made_by))  # tuples become lists
    for name in [*maker, *wanted]:
        was, now = maker.get(name), wanted.get(name)
        if name == "ladder" and was and now:  # rungs to come may be others
            was, now = (rungs[: state.stage + (state.step > 0)] for rungs in (was, now))
        if was != now:
            return f"is of another run: its {name} is {was}, not {now}"
    return None


def architecture(model: torch.nn.Module) -> dict[str, Any]:
    """The config of a network as entries of `Trainer.made_by`; its dropout may change."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_") and name != "dropout"}
    return {f"network.{name}": value for name, value in config.items()}


def _checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
    return value


def open_output_dir(accelerator: Accelerator, config: TrainingConfig, made_by: dict[str, Any]) -> Path | None:
    """Choose the checkpoint to resume from, or None, and bring `output_dir` to where that stands.

    Later lines of the metrics are cut off; later checkpoints, such as damaged ones, are renamed to `unused-*`.
    Raises as `check_output_dir` and `choose_checkpoint` do.
    """
    output_dir, checkpoint = Path(config.output_dir), choose_checkpoint(config, made_by)
    accelerator.wait_for_everyone()  # nobody writes before everyone has looked
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        metrics = output_dir / METRICS_FILE
        leftovers = list(output_dir.glob("partial-checkpoint-*"))
        if checkpoint is None:
            for old in (metrics, output_dir / EVALUATION_FILE):
                old.unlink(missing_ok=True)
            for pattern in ("checkpoint-*", "unused-*", "samples", "best"):
                leftovers += output_dir.glob(pattern)
        else:
            reached = read_state(checkpoint).global_step
            for later in find_checkpoints(output_dir):
                if int(_step(later)) > reached:
                    shutil.rmtree(unused := later.with_name(f"unused-{later.name}"), ignore_errors=True)
                    later.rename(unused)
        for old in leftovers:
            shutil.rmtree(old)
        if checkpoint is not None and metrics.exists():
            lines = [line for line in metrics.read_text().splitlines(True) if line.endswith("\n")]
            kept = metrics.with_name(f"partial-{METRICS_FILE}")
            kept.write_text("".join(line for line in lines if json.loads(line)["global_step"] <= reached))
            kept.replace(metrics)
    accelerator.wait_for_everyone()
    return checkpoint


def read_state(checkpoint: Path) -> TrainerState:
    """Where the run stood that wrote a checkpoint."""
    record = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return TrainerState(**{field.name: record[field.name] for field in fields(TrainerState)})


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
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        accelerator.wait_for_everyone()
        own = {"windows": state.windows, "streams": state.streams}
        own = {name: gather_object([values[accelerator.process_index]]) for name, values in own.items() if values}
        if state.step:
            accelerator.save_state(str(partial))
            if ema is not None:
                shadow = {str(i): whole(value).contiguous() for i, value in enumerate(ema.shadow_params)}
                if accelerator.is_main_process:
                    save_file(shadow, partial / EMA_FILE)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            paths = sorted(path for path in partial.rglob("*") if path.is_file())
            files = {str(path.relative_to(partial)): (path.stat().st_size, _checksum(path)) for path in paths}
            record = asdict(state) | own | {"made_by": made_by, "files": files}
            write_json(partial / STATE_FILE, record | {"checksum": zlib.crc32(json.dumps(record).encode())})
            flush(output_dir)
    except Exception as error:  # a full disk is an OSError, a RuntimeError or a SafetensorError
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder} could not be written, the checkpoints before it are whole: {error}") from error
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        flush(output_dir)
        for old in find_checkpoints(output_dir)[: -config.checkpoints_total_limit]:
            shutil.rmtree(old.rename(old.with_name(f"partial-{old.name}")))  # what a kill leaves is cleared
    return folder


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


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP2 may have spread over the processes, whole on each."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _like(value: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A whole tensor, spread over the processes as `model` is."""
    if not hasattr(model, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, model.device_mesh, model.placements)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
