"""Two gloo processes on the CPU against one: the same numbers, the same model, one set of files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_examples import SMALL

ROOT = Path(__file__).parent.parent


def launch(processes, *args):
    """Run this file as a script under torch's launcher, which `accelerate launch --multi_gpu` is a front of."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += ["-m", "tests.test_processes", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def weights(folder):
    return load_file(Path(folder) / "unet/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("objective", ["pd", "rcfd"])
def test_two_processes_train_what_one_does(tmp_path, objective):
    launch(1, objective, tmp_path / "one", 8, 1)
    launch(2, objective, tmp_path / "two", 4, 1)
    one, two = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                for name in ("one", "two"))  # fmt: skip
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name in ("loss", "grad_norm", *(("cfd", "entropy", "diversity") if objective == "rcfd" else ())):
            assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-7), name
    for rung in ("2-step", "1-step"):
        alone, together = weights(tmp_path / "one" / rung), weights(tmp_path / "two" / rung)
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5)
    names = [sorted(path.name for path in (tmp_path / run).iterdir()) for run in ("one", "two")]
    assert names[0] == names[1]


def test_two_processes_resume_to_the_same_weights(tmp_path):
    launch(2, "rcfd", tmp_path / "whole", 4, 1)
    launch(2, "rcfd", tmp_path / "resumed", 4, 1, "stop")
    launch(2, "rcfd", tmp_path / "resumed", 4, 1, "resume")
    for rung in ("2-step", "1-step"):
        name = f"{rung}/unet/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "resumed/metrics.jsonl").read_bytes()


def test_two_processes_train_the_student_of_sfd_that_one_does(tmp_path):
    """SFD-v: every process draws the same step counts, and its share of the noise."""
    launch(1, "sfd", tmp_path / "one", 8, 1)
    launch(2, "sfd", tmp_path / "two", 4, 1)
    one, two = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two"))
    for first, second in zip(map(json.loads, one), map(json.loads, two), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-3, atol=1e-5)


def test_main_job_on_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["examples/distill_rcfd.py", *SMALL, "--output_dir", str(tmp_path / "run")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Everything is in") == 1
    assert len(json.loads((tmp_path / "run/comparison.json").read_text())) == 11


def main(objective, output_dir, batch_size, accumulation, mode=None):
    from diffusers_rcfd import CFDDistillationConfig, CFDDistillationTrainer, load_image_data
    from tests.toys import tiny_classifier, tiny_teacher

    torch.manual_seed(0)
    if objective == "sfd":
        distil_by_sfd(tiny_teacher(), output_dir, batch_size)
        return
    config = CFDDistillationConfig(
        output_dir=output_dir, objective=[objective], student_steps=[2, 1], max_train_steps=[4], logging_steps=1,
        train_batch_size=int(batch_size), gradient_accumulation_steps=int(accumulation), learning_rate=1e-3,
        checkpointing_steps=2, sample_steps=4, num_sample_images=4, random_flip=True,
        regularization_weight=[0.5], entropy_ratio=[0.25],
        resume_from_checkpoint="latest" if mode == "resume" else None,
    )  # fmt: skip
    teacher, data = tiny_teacher(), load_image_data(max_images=64)
    trainer = CFDDistillationTrainer(teacher, tiny_classifier().eval(), config, data)
    if mode == "stop":
        compute_loss = trainer.compute_loss

        def stop(batch):
            if trainer.state.global_step == 7:
                raise SystemExit(0)
            return compute_loss(batch)

        trainer.compute_loss = stop
    trainer.train()


def distil_by_sfd(teacher, output_dir, batch_size):
    from diffusers_rcfd import SFDDistillationConfig, SFDDistillationTrainer

    config = SFDDistillationConfig(
        output_dir=output_dir, student_steps=[1, 2], max_train_steps=4, logging_steps=1, optimizer="sgd",
        train_batch_size=int(batch_size), learning_rate=1e-5,
    )  # fmt: skip
    SFDDistillationTrainer(teacher, None, config).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
