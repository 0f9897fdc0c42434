"""Two and four gloo processes on the CPU against one: the same numbers, the same model, one set of files."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

from diffusers_rcfd.trainers.checkpoints import find_checkpoints
from tests.test_examples import SMALL

ROOT = Path(__file__).parent.parent


OBJECTIVES = ("pd", "cfd", "rcfd")
SOURCES = {"images": "rcfd", "stream": "pd"}  # with what is trained on them
CONFIGS = ROOT / "examples/accelerate_configs"
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(processes, *args):
    """This file as a script under torch's launcher, which `accelerate launch --multi_gpu` is a front of."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, "-m", "tests.test_processes", *map(str, args)]


def launch(processes, *args):
    done = subprocess.run(command(processes, *args), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def weights(folder):
    return load_file(Path(folder) / "unet/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("objective", ["rcfd", pytest.param("pd", marks=pytest.mark.slow)])
def test_two_processes_train_what_one_does(tmp_path, objective):
    launch(1, objective, tmp_path / "one", 8, 1)
    launch(2, objective, tmp_path / "two", 4, 1)
    one, two = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                for name in ("one", "two"))  # fmt: skip
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name in ("loss", "grad_norm", *(("feature_kl", "entropy", "diversity") if objective == "rcfd" else ())):
            # The second rung begins from students that differ by roundings, to which cfd near 0 is sensitive.
            assert second[name] == pytest.approx(first[name], rel=1e-5, abs=5e-7), name
    for rung in ("2-step", "1-step"):
        alone, together = weights(tmp_path / "one" / rung), weights(tmp_path / "two" / rung)
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5)
    names = [sorted(path.name for path in (tmp_path / run).iterdir()) for run in ("one", "two")]
    assert names[0] == names[1]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """Folders of what two processes train without a stop, from images and from a stream of them."""
    folder = tmp_path_factory.mktemp("never_stopped")
    for source, objective in SOURCES.items():
        launch(2, objective, folder / source, 4, 1, "run", source)
    return folder


def assert_same_run(one, other):
    for name in ("2-step/unet/diffusion_pytorch_model.safetensors", "1-step/unet/diffusion_pytorch_model.safetensors",
                 "metrics.jsonl"):  # fmt: skip
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("source", SOURCES)
def test_two_processes_resume_to_the_same_weights(tmp_path, never_stopped, source):
    for mode in ("stop", "resume"):
        launch(2, SOURCES[source], tmp_path / "resumed", 4, 1, mode, source)
    assert_same_run(tmp_path / "resumed", never_stopped / source)


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


@pytest.fixture(scope="module")
def gradients_of_one_batch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    launch(1, "gradients", folder, 8, 1)
    return folder


@pytest.mark.parametrize(
    "processes, accumulation",
    [pytest.param(1, 4, marks=pytest.mark.slow), (2, 2), pytest.param(4, 1, marks=pytest.mark.slow)],
    ids=str,
)
def test_processes_and_accumulation_have_the_gradients_of_one_large_batch(
    tmp_path, gradients_of_one_batch, processes, accumulation
):
    """Of 8 images a step, over the border of an epoch of 20: each gradient, and diversity over the whole batch."""
    launch(processes, "gradients", tmp_path, 8 // processes // accumulation, accumulation)
    for objective in OBJECTIVES:
        for kind, tolerance in (("float64", 1e-6), ("float32", 1e-5)):
            file = f"{objective}-{kind}.safetensors"
            one, many = load_file(gradients_of_one_batch / file), load_file(tmp_path / file)
            for name, value in one.items():
                error = (many[name].double() - value.double()).norm() / value.double().norm()
                assert error < tolerance, (objective, kind, name, error)
    assert {"step-2", "diversity"} <= one.keys()


def test_signal_to_one_process_saves_and_ends_both(tmp_path, never_stopped):
    """As a cluster's preemption of one node; then the run goes on to the weights of one that was never stopped."""
    options = ("rcfd", tmp_path / "left", 4, 1)
    done = subprocess.run(command(2, *options, "signal"), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0 and "exitcode  : 143" in done.stderr, done.stderr
    assert find_checkpoints(tmp_path / "left")[-1].name == "checkpoint-3"
    launch(2, *options, "resume")
    assert_same_run(tmp_path / "left", never_stopped / "images")


def test_engine_configs_are_read_by_accelerate():
    kinds = {path.stem: load_config_from_file(str(path)) for path in CONFIGS.glob("*.yaml")}
    expected = {"single_gpu": DistributedType.NO, "multi_gpu": DistributedType.MULTI_GPU,
                "multi_node": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP,
                "deepspeed_zero2": DistributedType.DEEPSPEED, "cpu_gloo": DistributedType.MULTI_GPU}  # fmt: skip
    assert {name: config.distributed_type for name, config in kinds.items()} == expected
    assert kinds["multi_node"].num_machines == 2 and kinds["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert kinds["deepspeed_zero2"].deepspeed_config["zero_stage"] == 2 and kinds["cpu_gloo"].use_cpu


def test_engine_config_of_the_cpu_runs_two_processes(tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu_gloo.yaml")]
    line = [*launcher, "examples/train_teacher.py", "--max_train_steps", "2", "--train_batch_size", "8"]
    line += ["--unet_preset", "digits", "--sample_steps", "0", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_fsdp2_processes_resume_and_train_what_data_parallel_ones_do(tmp_path):
    """Weights and optimizer sharded over two processes: averages, checkpoints, resume and a whole model at the end."""
    launch(2, "engine", tmp_path / "ddp", "ddp", 6)
    launch(2, "engine", tmp_path / "whole", "fsdp2", 6)
    launch(2, "engine", tmp_path / "resumed", "fsdp2", 3)
    launch(2, "engine", tmp_path / "resumed", "fsdp2", 6)
    for rung in ("base", "2-step"):
        one, two, three = (weights(tmp_path / name / rung) for name in ("ddp", "whole", "resumed"))
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(two, three, rtol=0, atol=0)
    for name in ("base", "."):
        lines = [(tmp_path / run / name / "metrics.jsonl").read_text() for run in ("whole", "resumed")]
        assert lines[0] == lines[1]


def engine(output_dir, kind, stop):
    """Train a base model and a student of it with averages, by data-parallel or FSDP2 processes, up to a step."""
    from accelerate import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    from diffusers_rcfd import (
        CFDDistillationConfig,
        CFDDistillationTrainer,
        DiffusionConfig,
        DiffusionTrainer,
        RCFDPipeline,
        RCFDScheduler,
        load_image_data,
    )
    from tests.toys import tiny_classifier, tiny_unet

    shared = {"max_train_steps": 5, "train_batch_size": 4, "logging_steps": 2, "checkpointing_steps": 2,
              "learning_rate": 1e-3, "lr_warmup_steps": 0, "ema_decay": 0.9,
              "resume_from_checkpoint": "latest"}  # fmt: skip
    torch.manual_seed(0)
    data, unet, classifier = load_image_data(max_images=64), tiny_unet(), tiny_classifier().eval()

    def train(trainer):
        if kind == "fsdp2":  # which Accelerate itself starts on accelerators alone
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state = trainer.accelerator.state
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="NO_WRAP", state_dict_type="SHARDED_STATE_DICT"
            )
        compute_loss = trainer.compute_loss

        def interrupt(stage, batch):
            if trainer.state.step >= int(stop):
                raise SystemExit(0)
            return compute_loss(stage, batch)

        trainer.compute_loss = interrupt
        trainer.train()

    train(DiffusionTrainer(unet, RCFDScheduler(), DiffusionConfig(f"{output_dir}/base", **shared), data))
    teacher = RCFDPipeline.from_pretrained(f"{output_dir}/base")
    config = CFDDistillationConfig(str(output_dir), student_steps=[2], **shared)
    train(CFDDistillationTrainer(teacher, classifier, config, data))


def gradients(output_dir, batch_size, accumulation):
    """Every gradient and loss term of three steps of each objective, in both number types."""
    from diffusers_rcfd import CFDDistillationConfig, CFDDistillationTrainer, load_image_data
    from diffusers_rcfd.trainers import trainer as training
    from tests.toys import tiny_classifier, tiny_teacher, tiny_unet

    class InType(CFDDistillationTrainer):
        """Trains on images and noise of one floating type, and keeps what it sees."""

        def draw(self, stage, size, generator):
            draws = super().draw(stage, size, generator)
            return {k: v.to(self.kind) if v.is_floating_point() else v for k, v in draws.items()}

        def pairs(self, stage, batch):
            return super().pairs(stage, batch | {"images": batch["images"].to(self.kind)})

        def _optimizer_step(self, *args):
            terms = super()._optimizer_step(*args)
            for name in ("loss", "diversity"):
                if name in terms:
                    mean = self.accelerator.reduce(terms[name], "mean")
                    self.seen[name] = torch.cat([self.seen.get(name, torch.empty(0)), mean.reshape(1)])
            return terms

    clip = training.clip_gradients

    def record(accelerator, model, *args):
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        run.seen[f"step-{run.state.step}"] = gradient.clone()
        return clip(accelerator, model, *args)

    training.clip_gradients = record
    for objective in OBJECTIVES:
        for kind in (torch.float64, torch.float32):
            name = f"{objective}-{str(kind).removeprefix('torch.')}"
            config = CFDDistillationConfig(
                output_dir=f"{output_dir}/{name}", objective=[objective], student_steps=[2], max_train_steps=[3],
                train_batch_size=int(batch_size), gradient_accumulation_steps=int(accumulation), learning_rate=1e-6,
                random_flip=True, regularization_weight=[0.5], entropy_ratio=[0.25], temperature=[0.1],
            )  # fmt: skip
            torch.manual_seed(0)
            teacher, classifier, student = tiny_teacher(), tiny_classifier().eval(), tiny_unet()
            with torch.no_grad():  # predictions far from uniform, or the gradients would be differences of near equals
                classifier.network.get_classifier().weight.mul_(30)
            teacher.unet.to(kind)
            data = load_image_data(max_images=20)
            run = InType(teacher, classifier.to(kind), config, data, student.to(kind))
            run.kind, run.seen = kind, {}
            run.train()
            if run.accelerator.is_main_process:
                save_file(run.seen, f"{output_dir}/{name}.safetensors")


def main(objective, output_dir, batch_size, accumulation, mode="run", source="images"):
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
    stream = {"streaming": True, "max_images": 24}  # three batches an epoch
    teacher, data = tiny_teacher(), load_image_data(**stream if source == "stream" else {"max_images": 64})
    trainer = CFDDistillationTrainer(teacher, tiny_classifier().eval(), config, data)
    compute_loss = trainer.compute_loss
    if mode == "signal":

        def preempt(stage, batch):
            if trainer.state.global_step == 2 and trainer.accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return compute_loss(stage, batch)

        trainer.compute_loss = preempt
    if mode == "stop":

        def stop(stage, batch):
            if trainer.state.global_step == 7:
                raise SystemExit(0)
            return compute_loss(stage, batch)

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
    if sys.argv[1] in ("gradients", "engine"):
        {"gradients": gradients, "engine": engine}[sys.argv[1]](*sys.argv[2:])
    else:
        main(*sys.argv[1:])
