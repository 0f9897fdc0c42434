"""EDM's networks in our terms: equal predictions, equal steps, students that learn."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from diffusers.utils.logging import disable_propagation, enable_propagation

from diffusers_rcfd import (
    CFDDistillationConfig,
    CFDDistillationTrainer,
    RCFDPipeline,
    SFDDistillationConfig,
    SFDDistillationTrainer,
    load_image_data,
)
from diffusers_rcfd.models.edm import edm_sigmas, from_edm
from diffusers_rcfd.pipelines.stock_samplers import StockSamplerPipeline
from tests.toys import parameters, tiny_unet


def edm_unet(**overrides):
    torch.manual_seed(0)
    return tiny_unet(**overrides).eval()


NOISE = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@torch.no_grad()
def test_prediction_is_edms_at_every_noise_level(prediction_type, sigma_data):
    stock = EDMEulerScheduler(prediction_type=prediction_type, sigma_data=sigma_data)
    unet = edm_unet()
    converted, scheduler = from_edm(unet, stock.config)
    x0 = NOISE.clamp(-1, 1)
    for k in (0, 300, 700, 1024):
        sigma = edm_sigmas(stock.config)[k].item()
        x = x0 + sigma * NOISE.flip(0)
        output = unet(stock.precondition_inputs(x, sigma), stock.precondition_noise(torch.tensor(sigma))).sample
        expected = stock.precondition_outputs(x, output, sigma)
        t = torch.full((4,), k)
        z = scheduler.add_noise(x0, NOISE.flip(0), t)
        predicted = scheduler.predict_x0(converted(z, t).sample, z, t)
        torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-5)
        alpha, sigma_t = scheduler.alpha[k].item(), scheduler.sigma[k].item()
        assert sigma_t / alpha == pytest.approx(sigma, rel=1e-9)


@pytest.mark.parametrize("sigma_schedule", ["karras", "exponential"])
@torch.no_grad()
def test_ddim_steps_are_edms_euler_steps(sigma_schedule):
    """The N-step grid is EDM's with N + 1 noise levels; EDM adds a last step to 0."""
    N = 8
    stock = EDMEulerScheduler(sigma_schedule=sigma_schedule)
    unet = edm_unet()
    pipeline = RCFDPipeline(unet, stock)
    stock.set_timesteps(N + 1)
    x = NOISE * stock.sigmas[0]
    for t in stock.timesteps[:-1]:
        output = unet(stock.scale_model_input(x, t), t).sample
        x = stock.step(output, t, x).prev_sample
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(N)
    z = scheduler.add_noise(torch.zeros_like(NOISE), NOISE, torch.full((4,), 1024))
    for t in scheduler.timesteps:
        z = scheduler.step(pipeline.unet(z, t).sample, t, z).prev_sample
    torch.testing.assert_close(z / scheduler.alpha[0].item(), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_saved_pipeline_of_edm_loads_converts_and_saves(tmp_path, kind):
    DDPMPipeline(edm_unet(), kind()).save_pretrained(tmp_path / "edm")
    pipeline = RCFDPipeline.from_pretrained(tmp_path / "edm")
    assert pipeline.scheduler.config.data_std == 0.5 and pipeline.unet.config.time_embedding_type == "learned"
    images = pipeline(4, 4, latents=NOISE, output_type="pt").images
    pipeline.save_pretrained(tmp_path / "ours")
    again = RCFDPipeline.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(again(4, 4, latents=NOISE, output_type="pt").images, images)
    assert json.loads((tmp_path / "ours/scheduler/scheduler_config.json").read_text())["_data_std"] == 0.5


def test_stock_samplers_agree_on_edm():
    """DDIM of the stock kind, which knows no data_std, gives our DDIM's images."""
    pipeline = RCFDPipeline(edm_unet(), EDMEulerScheduler())
    stock = StockSamplerPipeline(pipeline.unet, pipeline.scheduler, sampler="ddim")
    for N in (2, 8):
        ours = pipeline(4, N, latents=NOISE, output_type="pt").images
        torch.testing.assert_close(stock(4, N, latents=NOISE, output_type="pt").images, ours, rtol=0, atol=2e-4)


def test_student_of_sfd_has_no_stock_form_and_says_so(tmp_path, caplog):
    """Plain Diffusers knows no data_std: the card shows the call that gives the same images, and saving warns."""
    teacher = RCFDPipeline(edm_unet(num_class_embeds=10), EDMEulerScheduler())
    config = SFDDistillationConfig(str(tmp_path / "student"), student_steps=[1, 2], max_train_steps=1,
                                   train_batch_size=4)  # fmt: skip
    trainer = SFDDistillationTrainer(teacher, config=config)
    enable_propagation()
    try:
        trainer.train()
    finally:
        disable_propagation()
    assert "knows no `data_std`=0.5" in caplog.text
    student = RCFDPipeline.from_pretrained(tmp_path / "student")
    assert student.scheduler.config.data_std == 0.5 and not student.scheduler.has_stock_form
    own = DiffusionPipeline.from_pretrained(tmp_path / "student", custom_pipeline=str(tmp_path / "student"),
                                            trust_remote_code=True)  # fmt: skip
    images = (pipe(4, 2, latents=NOISE, class_labels=[0, 1, 2, 3], output_type="pt").images for pipe in (student, own))
    torch.testing.assert_close(*images)
    trainer.create_model_card(tmp_path / "student")
    card = (tmp_path / "student/README.md").read_text()
    assert "custom_pipeline=repo" in card and "init_noise_sigma" not in card and "[i % 10 for i in range(16)]" in card


def test_student_keeps_the_parametrisation(tmp_path):
    teacher = RCFDPipeline(edm_unet(num_class_embeds=10), EDMEulerScheduler())
    config = CFDDistillationConfig(str(tmp_path), student_steps=[2], teacher_steps=[4], objective=["pd"],
                                   max_train_steps=[3], train_batch_size=8, learning_rate=1e-3)  # fmt: skip
    before = parameters(teacher.unet).clone()
    trainer = CFDDistillationTrainer(teacher, None, config, load_image_data(max_images=16))
    trainer.train()
    student = RCFDPipeline.from_pretrained(tmp_path / "2-step")
    assert student.scheduler.config.data_std == 0.5 and student.scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(student.scheduler.alpha, teacher.scheduler.alpha)
    assert not torch.equal(parameters(student.unet), before)
    trainer.create_model_card(tmp_path / "2-step")
    card = (tmp_path / "2-step/README.md").read_text()
    assert "custom_pipeline=repo" in card and "use_clipped_model_output" not in card


def test_custom_pipeline_knows_the_scale(tmp_path):
    """In the saved file's own code, as plain Diffusers runs it."""
    pipeline = RCFDPipeline(edm_unet(), EDMEulerScheduler())
    pipeline.save_pretrained(tmp_path)
    other = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True)
    assert type(other).__module__ != RCFDPipeline.__module__
    images = pipeline(4, 2, latents=NOISE, output_type="pt").images
    torch.testing.assert_close(other(4, 2, latents=NOISE, output_type="pt").images, images)


def test_what_cannot_be_converted():
    with pytest.raises(ValueError, match="`time_embedding_type='positional'`.*got 'fourier'"):
        RCFDPipeline(edm_unet(time_embedding_type="fourier"), EDMEulerScheduler())
    with pytest.raises(ValueError, match="`prediction_type` of EDM must be 'epsilon' or 'v_prediction', got 'sample'"):
        RCFDPipeline(edm_unet(), EDMEulerScheduler(prediction_type="sample"))
