"""Where a run stands, and the checkpoints that say so."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers_rcfd.configs import TrainingConfig

STATE_FILE = "trainer_state.json"


@dataclass
class TrainerState:
    """Where a run stands, as saved in a checkpoint: `step` counts within the stage, `global_step` over all."""

    stage: int = 0
    step: int = 0
    global_step: int = 0
    seconds: float = 0.0  # of training, over all sessions
    window: dict[str, float] = field(default_factory=dict)  # sums of the loss terms since the last line of metrics
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


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
