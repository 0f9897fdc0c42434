"""Where a run stands, and the checkpoints that say so."""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from diffusers_rcfd.configs import TrainingConfig

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
    window: dict[str, float] = field(default_factory=dict)  # sums of the loss terms since the last line of metrics
    best: float | None = None  # score of the stage's best evaluation, higher is better
    # Of a streaming data set, for each process: the epoch it reads, and the stage's batches before that epoch.
    streams: list[list[int]] = field(default_factory=list)


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first: those that were renamed after their last file was written."""
    found = [path.parent for path in Path(output_dir).glob(f"checkpoint-*/{STATE_FILE}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def check_output_dir(config: TrainingConfig) -> Path | None:
    """Check that `output_dir` may be used; returns the checkpoint to resume from, or None.

    Raises:
        ValueError: if it is not empty and neither resumed from nor overwritten.
        FileNotFoundError: if `resume_from_checkpoint` names no whole checkpoint.
    """
    output_dir, resume = Path(config.output_dir), config.resume_from_checkpoint
    if resume not in (None, "latest"):
        checkpoint = Path(resume)
        if not (checkpoint / STATE_FILE).is_file():
            raise FileNotFoundError(
                f"`resume_from_checkpoint` must name a whole checkpoint; {resume!r} lacks {STATE_FILE}."
            )
        return checkpoint
    if resume == "latest":
        checkpoints = find_checkpoints(output_dir)
        return checkpoints[-1] if checkpoints else None
    if not config.overwrite_output_dir and output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(
            f"`output_dir` must be an empty folder, got {str(output_dir)!r}: choose another, or pass "
            "`overwrite_output_dir` or `resume_from_checkpoint='latest'`."
        )
    return None


def open_output_dir(accelerator: Accelerator, config: TrainingConfig) -> Path | None:
    """Check `output_dir` and make it ready; the checkpoint to resume from, with the metrics cut back to it, or None.

    Raises as `check_output_dir` does.
    """
    output_dir, checkpoint = Path(config.output_dir), check_output_dir(config)
    accelerator.wait_for_everyone()  # nobody writes before everyone has looked
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        metrics = output_dir / METRICS_FILE
        if checkpoint is None:
            for old in (metrics, output_dir / EVALUATION_FILE):
                old.unlink(missing_ok=True)
            for pattern in ("checkpoint-*", "samples", "best"):
                for old in output_dir.glob(pattern):
                    shutil.rmtree(old)
        elif metrics.exists():
            reached = read_state(checkpoint).global_step
            lines = [line for line in metrics.read_text().splitlines(True) if line.endswith("\n")]
            metrics.write_text("".join(line for line in lines if json.loads(line)["global_step"] <= reached))
    accelerator.wait_for_everyone()
    return checkpoint


def read_state(checkpoint: Path) -> TrainerState:
    """Where the run stood that wrote a checkpoint."""
    return TrainerState(**json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")))


def save_checkpoint(
    accelerator: Accelerator, state: TrainerState, ema: EMAModel | None, config: TrainingConfig
) -> Path:
    """Write a checkpoint beside its final place, then rename it; older ones go once it is safe. On every process.

    Args:
        accelerator (`Accelerator`): holds the model, optimizer and schedule; at step 0 of a stage nothing of them.
        state (`TrainerState`): where the run stands.
        ema (`EMAModel`, *optional*): the averaged weights.
        config (`TrainingConfig`): `output_dir`, and `checkpoints_total_limit` that are kept.

    Returns:
        `Path`: `output_dir/checkpoint-{global_step}`.
    """
    output_dir = Path(config.output_dir)
    folder = output_dir / f"checkpoint-{state.global_step}"
    partial = folder.with_name(f"partial-{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    accelerator.wait_for_everyone()
    if state.streams:
        state.streams = gather_object([state.streams[accelerator.process_index]])
    if state.step:
        accelerator.save_state(str(partial))
    if accelerator.is_main_process and state.step and ema is not None:
        save_file({str(i): value.contiguous() for i, value in enumerate(ema.shadow_params)}, partial / EMA_FILE)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(partial / STATE_FILE, asdict(state))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in find_checkpoints(output_dir)[: -config.checkpoints_total_limit]:
            shutil.rmtree(old)
    return folder


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, state: TrainerState, ema: EMAModel | None) -> None:
    """Put back what a checkpoint holds of the model, optimizer, schedule and averaged weights of a stage."""
    accelerator.load_state(str(checkpoint))
    if ema is not None:
        saved = load_file(checkpoint / EMA_FILE, device=str(accelerator.device))
        for i, shadow in enumerate(ema.shadow_params):
            shadow.copy_(saved[str(i)])
        ema.optimization_step = state.step


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
