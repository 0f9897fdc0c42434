"""The rung that changes what a teacher predicts, and adoption as a part of the jobs."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_rcfd import AdoptionConfig, AdoptionTrainer, RCFDPipeline, adopt, load_image_data
from diffusers_rcfd.distillation.adoption import adoption_pairs
from diffusers_rcfd.models.denoiser import Denoiser
from tests.test_examples import SMALL
from tests.toys import parameters, tiny_unet


@pytest.fixture(scope="module")
def digits():
    return load_image_data(max_images=64)


def epsilon_teacher():
    """As Diffusers' own script makes it: epsilon on the linear schedule with 1000 entries."""
    torch.manual_seed(0)
    return DDPMPipeline(tiny_unet(), DDPMScheduler())


def trainer(folder, digits, teacher=None, **options):
    defaults = {"max_train_steps": 4, "train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1,
                "checkpointing_steps": 2, "ema_decay": 0.5, "sample_inference_steps": 2}  # fmt: skip
    return AdoptionTrainer(teacher or epsilon_teacher(), AdoptionConfig(str(folder), **defaults | options), digits)


def test_adopted_teacher_predicts_v_on_our_grid(tmp_path, digits):
    adopted = trainer(tmp_path, digits).train()
    saved = RCFDPipeline.from_pretrained(tmp_path)
    for pipeline in (adopted, saved):
        assert pipeline.scheduler.config.prediction_type == "v_prediction" and len(pipeline.scheduler) == 1025
        assert pipeline.scheduler.config.num_inference_steps is None
    assert torch.equal(parameters(adopted.unet), parameters(saved.unet))
    assert not torch.equal(parameters(adopted.unet), parameters(adopt(epsilon_teacher()).unet))


def test_targets_are_the_teachers_own_x0_clipped_as_it_clips(digits):
    teacher = adopt(epsilon_teacher())
    denoiser = Denoiser(teacher.unet, teacher.scheduler)
    generator = torch.Generator().manual_seed(0)
    batch = {"images": torch.rand((4, 1, 8, 8), generator=generator) * 2 - 1,
             "noise": torch.randn((4, 1, 8, 8), generator=generator), "t": torch.tensor([1024, 700, 300, 5]),
             "flip": torch.zeros(4, dtype=torch.bool)}  # fmt: skip
    (pair,) = adoption_pairs(denoiser, denoiser, batch)
    z_t = teacher.scheduler.add_noise(batch["images"], batch["noise"], batch["t"])
    expected = denoiser(z_t, batch["t"])
    assert expected.abs().max() > 1
    torch.testing.assert_close(pair.x0_target, expected.clamp(-1, 1))
    torch.testing.assert_close(pair.x0, expected)


def test_training_brings_the_copy_towards_its_teacher(tmp_path, digits):
    run = trainer(tmp_path, digits, max_train_steps=60, learning_rate=3e-3, checkpointing_steps=0, ema_decay=0)
    stage, generator = run.begin(), torch.Generator().manual_seed(0)
    images = torch.rand((32, 1, 8, 8), generator=generator) * 2 - 1
    batch = {"images": images} | run.draw(stage, 32, generator) | {"t": torch.arange(32) * 33}

    def error(network):
        stage.model = network
        (pair,) = run.pairs(stage, batch)
        with torch.no_grad():
            return (pair.x0 - pair.x0_target).square().mean()

    before = error(stage.model)
    assert error(run.train().unet) < 0.75 * before


def test_resume_is_bit_identical(tmp_path, digits):
    trainer(tmp_path / "whole", digits).train()
    run = trainer(tmp_path / "resumed", digits)
    compute_loss = run.compute_loss

    def interrupt(stage, pair):
        if run.state.step == 3:
            raise KeyboardInterrupt
        return compute_loss(stage, pair)

    run.compute_loss = interrupt
    with pytest.raises(KeyboardInterrupt):
        run.train()
    trainer(tmp_path / "resumed", digits, resume_from_checkpoint="latest").train()
    for name in ("unet/diffusion_pytorch_model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_teacher_that_predicts_v_needs_no_training(tmp_path, digits):
    teacher = DDPMPipeline(tiny_unet(), DDPMScheduler(prediction_type="v_prediction"))
    adopted = trainer(tmp_path, digits, teacher).train()
    assert len(adopted.scheduler) == 1025 and not (tmp_path / "metrics.jsonl").exists()
    assert torch.equal(parameters(RCFDPipeline.from_pretrained(tmp_path).unet), parameters(adopted.unet))


def test_flow_matching_teacher_becomes_one_that_predicts_v(tmp_path, digits):
    flow = RCFDPipeline(tiny_unet(), FlowMatchEulerDiscreteScheduler())
    assert flow.scheduler.config.prediction_type == "flow_prediction"
    adopted = trainer(tmp_path, digits, flow).train()
    assert adopted.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("command", ["distill", pytest.param("sfd", marks=pytest.mark.slow)])
def test_jobs_adopt_a_teacher_of_another_kind(tmp_path, command):
    from importlib import import_module

    epsilon_teacher().save_pretrained(tmp_path / "teacher")
    options = [*SMALL, "--teacher", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "run")]
    options += [
        "--adoption_max_train_steps",
        "2",
        "--adoption_train_batch_size",
        "8",
        "--adoption_lr_warmup_steps",
        "0",
    ]
    options += ["--objective", "pd"] if command == "distill" else ["--objective", "l1", "--l1_weight", "0"]
    import_module(f"diffusers_rcfd.cli.{command}").main(options)
    adopted = RCFDPipeline.from_pretrained(tmp_path / "run/adopted")
    assert adopted.scheduler.config.prediction_type == "v_prediction" and len(adopted.scheduler) == 1025
    student = RCFDPipeline.from_pretrained(
        tmp_path / ("run/students/1-step" if command == "distill" else "run/student")
    )
    assert student.scheduler.config.prediction_type == "v_prediction"
