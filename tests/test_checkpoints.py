import json
import shutil
from pathlib import Path

import pytest
import torch

from diffusers_rcfd import (
    CFDDistillationConfig,
    CFDDistillationTrainer,
    ClassifierConfig,
    ClassifierTrainer,
    DiffusionConfig,
    DiffusionTrainer,
    RCFDScheduler,
    load_image_data,
)
from diffusers_rcfd.trainers.checkpoints import STATE_FILE, find_checkpoints, find_fault, read_state
from tests.toys import largest_file, parameters, tiny_classifier, tiny_teacher, tiny_unet


@pytest.fixture(scope="module")
def digits():
    return load_image_data(max_images=32)


OPTIONS = {"train_batch_size": 4, "logging_steps": 1, "checkpointing_steps": 1, "checkpoints_total_limit": 9}


def base(folder, digits, unet=None, **options):
    torch.manual_seed(0)
    options = {"max_train_steps": 3, "lr_warmup_steps": 0, "ema_decay": 0.9} | OPTIONS | options
    return DiffusionTrainer(unet or tiny_unet(), RCFDScheduler(), DiffusionConfig(str(folder), **options), digits)


def ladder(folder, digits, **options):
    options = {"student_steps": [2, 1], "objective": ["pd"], "max_train_steps": [2]} | OPTIONS | options
    return CFDDistillationTrainer(tiny_teacher(), None, CFDDistillationConfig(str(folder), **options), digits)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    """A run of three steps with a checkpoint after each, the last of which says that it is done."""
    folder = tmp_path_factory.mktemp("run")
    base(folder, digits).train()
    return folder


@pytest.fixture
def run_folder(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_every_file_of_a_checkpoint_is_listed(finished):
    checkpoint = finished / "checkpoint-2"
    files = json.loads((checkpoint / STATE_FILE).read_text())["files"]
    assert sorted([*files, STATE_FILE]) == sorted(path.name for path in checkpoint.iterdir())
    assert {"model.safetensors", "optimizer.bin", "scheduler.bin", "ema.safetensors"} <= files.keys()
    assert read_state(checkpoint).step == 2
    assert not list(finished.glob("partial-*"))


@pytest.mark.parametrize("damage", [cut, flip_a_bit, Path.unlink], ids=["truncated", "flipped bit", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "ema.safetensors", STATE_FILE])
def test_damaged_checkpoint_is_refused_by_name_and_the_one_before_taken(run_folder, digits, name, damage):
    shutil.rmtree(run_folder / "checkpoint-3")
    if name == STATE_FILE and damage is Path.unlink:
        pytest.skip("is no checkpoint then")
    damage(run_folder / "checkpoint-2" / name)
    run = base(run_folder, digits, resume_from_checkpoint="latest")
    with pytest.warns(UserWarning, match=f"checkpoint-1: .*checkpoint-2 .*{name}"):
        run.train()
    assert (run_folder / "unused-checkpoint-2").is_dir()
    assert [path.name for path in find_checkpoints(run_folder)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    lines = [json.loads(line)["global_step"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3]


def test_named_checkpoint_that_is_damaged_is_an_error(run_folder, digits):
    cut(run_folder / "checkpoint-2/optimizer.bin")
    named = str(run_folder / "checkpoint-2")
    before = sorted(run_folder.iterdir())
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must .*checkpoint-2 is not whole: optimizer.bin"):
        base(run_folder, digits, resume_from_checkpoint=named).train()
    assert sorted(run_folder.iterdir()) == before


def test_all_checkpoints_refused_is_an_error_that_leaves_them(run_folder, digits):
    other = tiny_unet(block_out_channels=(4, 8))
    before = sorted(run_folder.iterdir())
    with pytest.raises(
        ValueError, match=r"network.block_out_channels is \[8, 8\], not \[4, 8\].*overwrite_output_dir"
    ):
        base(run_folder, digits, unet=other, resume_from_checkpoint="latest").train()
    assert sorted(run_folder.iterdir()) == before


def test_going_back_to_an_earlier_checkpoint_sets_later_ones_aside(run_folder, digits):
    base(
        run_folder, digits, resume_from_checkpoint=str(run_folder / "checkpoint-1"), checkpoints_total_limit=2
    ).train()
    assert [path.name for path in find_checkpoints(run_folder)] == ["checkpoint-2", "checkpoint-3"]
    assert sorted(path.name for path in run_folder.glob("unused-*")) == ["unused-checkpoint-2", "unused-checkpoint-3"]


def test_stopped_while_an_old_checkpoint_is_deleted_leaves_nothing_behind(run_folder, digits, monkeypatch):
    """The files go one by one: what is left of them has no checkpoint's name, and the next start clears it."""
    delete = Path.unlink

    def stop(path, **options):
        delete(path, **options)
        if path.parent.name == "partial-checkpoint-1":
            raise KeyboardInterrupt

    first = str(run_folder / "checkpoint-1")
    monkeypatch.setattr(Path, "unlink", stop)
    with pytest.raises(KeyboardInterrupt):
        base(run_folder, digits, resume_from_checkpoint=first, checkpoints_total_limit=2).train()
    monkeypatch.setattr(Path, "unlink", delete)
    assert (run_folder / "partial-checkpoint-1").is_dir() and not (run_folder / "checkpoint-1").exists()
    base(run_folder, digits, resume_from_checkpoint="latest").train()
    assert not list(run_folder.glob("partial-*"))
    assert [path.name for path in find_checkpoints(run_folder)] == ["checkpoint-2", "checkpoint-3"]


def test_checkpoint_of_another_run_is_told_apart(tmp_path, digits):
    run = ladder(tmp_path, digits)
    run.train()
    first, second = tmp_path / "checkpoint-1", tmp_path / "checkpoint-3"  # inside the first rung, inside the second

    def fault(checkpoint, other):
        return find_fault(checkpoint, other.made_by())

    assert fault(first, run) is None and fault(second, run) is None
    assert "trainer is CFDDistillationTrainer, not DiffusionTrainer" in fault(first, base(tmp_path, digits))
    by_steps = ladder(tmp_path, digits, student_steps=[4, 1])
    assert "of another run: its ladder is ['2 steps from 2 by pd'], not ['4 steps" in fault(first, by_steps)
    later = ladder(tmp_path, digits, student_steps=[2, 1], teacher_steps=[2, 2], max_train_steps=[2, 5])
    longer = ladder(tmp_path, digits, student_steps=[4, 2, 1])
    shorter = ladder(tmp_path, digits, student_steps=[2])
    assert fault(first, later) is None and fault(first, shorter) is None
    assert "ladder" in fault(second, shorter) and "ladder" in fault(second, longer)


def test_classifier_of_another_kind(tmp_path, digits):
    options = {"max_train_steps": 2} | OPTIONS
    ClassifierTrainer(tiny_classifier(), ClassifierConfig(str(tmp_path), **options), digits).train()
    config = ClassifierConfig(str(tmp_path), resume_from_checkpoint="latest", **options)
    with pytest.raises(ValueError, match="network.num_classes is 10, not 12"):
        ClassifierTrainer(tiny_classifier(num_classes=12), config, digits).train()


def test_full_disk_is_an_error_and_the_checkpoint_before_goes_on(tmp_path, digits):
    """A limit on the size of files in place of a disk that is full in the middle of a checkpoint."""
    run = base(tmp_path / "run", digits)
    save, sizes = run._save_checkpoint, iter((None, 20_000))

    def save_while_the_disk_fills(stage, sums):
        with largest_file(next(sizes)):
            save(stage, sums)

    run._save_checkpoint = save_while_the_disk_fills
    with pytest.raises(OSError, match="checkpoint-2 could not be written, the checkpoints before it are whole: "):
        run.train()
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    assert not list((tmp_path / "run").glob("partial-*"))
    resumed = base(tmp_path / "run", digits, resume_from_checkpoint="latest").train()
    assert torch.equal(parameters(resumed.unet), parameters(base(tmp_path / "whole", digits).train().unet))


def test_full_disk_in_the_save_of_the_result_is_an_error_and_the_run_goes_on(tmp_path, digits):
    run = base(tmp_path / "run", digits)
    finish_stage = run.finish_stage

    def finish_while_the_disk_fills(stage):
        with largest_file(20_000):
            finish_stage(stage)

    run.finish_stage = finish_while_the_disk_fills
    with pytest.raises(OSError, match="base could not be saved in .*run; its checkpoints are whole: .*too large"):
        run.train()
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]
    resumed = base(tmp_path / "run", digits, resume_from_checkpoint="latest").train()
    assert torch.equal(parameters(resumed.unet), parameters(base(tmp_path / "whole", digits).train().unet))
