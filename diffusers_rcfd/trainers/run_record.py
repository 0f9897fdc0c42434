"""What a run is made by: recorded in each checkpoint and in `run.json`, and compared before a run goes on.

A run that goes on with another learning rate, teacher or data set would be none that its record describes. What does
not change its weights may differ, and is recorded from the step on from which it does.
"""

import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from diffusers_rcfd.saving import read_json, write_json
from diffusers_rcfd.trainers.config import TrainingConfig

RUN_FILE = "run.json"
PACKAGES = ("torch", "diffusers", "accelerate", "transformers", "datasets", "timm")

# Where a run is and how it begins, which is recorded nowhere.
PLACES = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "hub_token")
# What does not change the weights of a run, or their roundings alone.
MAY_CHANGE = (
    "train_batch_size", "max_skipped_steps", "torch_compile", "channels_last", "gradient_checkpointing",
    "dataloader_num_workers", "logging_steps", "eval_steps", "sample_steps", "num_sample_images",
    "sample_inference_steps", "checkpointing_steps", "checkpoints_total_limit", "report_to", "push_to_hub",
    "hub_model_id", "hub_private_repo", "hub_strategy", "load_best_model_at_end",
)  # fmt: skip
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")


def describe_options(
    config: TrainingConfig, num_processes: int, device: str, besides: tuple[str, ...] = ()
) -> dict[str, dict[str, Any]]:
    """The options of a run and its surroundings, as entries of what it is made by.

    Args:
        config (`TrainingConfig`): the options.
        num_processes (`int`): processes of the run; a batch is that of all of them.
        device (`str`): type of the device.
        besides (`tuple[str, ...]`): options that are described elsewhere, such as those of the rungs of a ladder.

    Returns:
        `dict`: "options", which a run cannot go on without, and "may_change".
    """
    given = {name: value for name, value in asdict(config).items() if name not in (*PLACES, *besides)}
    options = {name: value for name, value in given.items() if name not in MAY_CHANGE}
    options["train_batch_size of all processes"] = config.train_batch_size * num_processes
    surroundings = {"num_processes": num_processes, "device": device}
    surroundings |= {f"version of {name}": version(name) for name in PACKAGES}
    return {
        "options": options,
        "may_change": {name: value for name, value in given.items() if name in MAY_CHANGE} | surroundings,
    }


def describe_environment(accelerator: Accelerator) -> dict[str, Any]:
    """Processes, device and versions of a session, for `run.json`."""
    return {
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def find_differences(
    was: dict[str, Any], now: dict[str, Any], stage: int, step: int
) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Compare what a checkpoint was made by with what is to go on from it.

    Entries are compared as a whole, but for "options" and "fingerprints", of which both sides must know a name;
    "rungs" and "ladder", of which rungs to come may be others; and "may_change". A checkpoint of version 0.1 has
    neither options nor fingerprints, which are then taken as unchanged.

    Args:
        was, now (`dict`): of `Trainer.made_by`, in the types of JSON.
        stage, step (`int`): where the checkpoint stands.

    Returns:
        the differences that are refused and those that may be, each as (old, new) by name.
    """
    begun = stage + (step > 0)  # stages
    nested = ("options", "fingerprints", "may_change", "rungs", "ladder")
    pairs = {name: (was.get(name), now.get(name)) for name in [*was, *now] if name not in nested}
    if was.get("ladder") and now.get("ladder"):
        pairs["ladder"] = (was["ladder"][:begun], now["ladder"][:begun])
    options = _common(was.get("options"), now.get("options"))
    pairs |= {name: pair for name, pair in options.items() if name not in pairs}
    pairs |= {f"fingerprint of the {name}": pair for name, pair in
              _common(was.get("fingerprints"), now.get("fingerprints")).items() if None not in pair}  # fmt: skip
    lengths = {"max_train_steps": stage == 0 and step > 0}  # by the name of the option: whether it is under way
    for index, rungs in enumerate(zip(was.get("rungs", [])[:begun], now.get("rungs", [])[:begun], strict=False)):
        pairs |= {f"{name} of rung {index + 1}": pair for name, pair in _common(*rungs).items()}
        lengths[f"max_train_steps of rung {index + 1}"] = index == stage
    different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    constant = now.get("options", {}).get("lr_scheduler") in CONSTANT_SCHEDULES
    longer = {name for name in different if constant and lengths.get(name) and different[name][1] >= step}
    changed = _common(was.get("may_change"), now.get("may_change"))
    changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
    changed |= {name: different[name] for name in longer}
    return {name: pair for name, pair in different.items() if name not in longer}, changed


def _common(was: dict | None, now: dict | None) -> dict[str, tuple]:
    """The values of the names that both sides have."""
    return {name: (was[name], now[name]) for name in was or {} if name in (now or {})}


def record_run(output_dir: Path, record: dict[str, Any], step: int, changes: dict[str, tuple]) -> None:
    """Write `run.json`: how a run began, and in "changes" what was otherwise from which step on.

    Args:
        output_dir (`Path`): the run's folder.
        record (`dict`): options and environment of this session, taken as a whole where the run begins.
        step (`int`): the global step that the session begins at.
        changes (`dict`): (old, new) by name, of `find_differences`.
    """
    path = output_dir / RUN_FILE
    before = read_json(path) if step else None
    before = before if isinstance(before, dict) else record
    kept = [change for change in before.get("changes", []) if change["step"] < step]
    new = [{"step": step, "name": name, "was": was, "is": now} for name, (was, now) in changes.items()]
    write_json(path, before | {"changes": kept + new})
