import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_rcfd import RCFDPipeline, RCFDScheduler
from diffusers_rcfd.pipelines.stock_samplers import StockSamplerPipeline
from diffusers_rcfd.schedulers.names import STOCK_SAMPLERS
from diffusers_rcfd.schedulers.scheduling_rcfd import eps_from_x0, v_from_x0
from tests.toys import tiny_sfd_student, tiny_teacher


class GaussianNetwork:
    """The exact denoiser of data N(mean, std^2) in each pixel, which has a closed-form flow."""

    mean, std = 0.3, 0.2

    def __init__(self, scheduler):
        self.scheduler, self.calls = scheduler, 0

    def x0(self, z, alpha, sigma):
        return self.mean + alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * (z - alpha * self.mean)

    def __call__(self, z, t, class_labels=None, return_dict=False):
        self.calls += 1
        n, position = len(self.scheduler), torch.as_tensor(float(t))
        ratio = (self.scheduler.sigma / self.scheduler.alpha).float()
        low = position.floor().long().clamp(max=n - 2)
        ratio = ratio[low] + (position - low) * (ratio[low + 1] - ratio[low])
        alpha = (1 + ratio**2) ** -0.5
        x0 = self.x0(z, alpha, ratio * alpha)
        convert = {"epsilon": eps_from_x0, "v_prediction": v_from_x0}.get(self.scheduler.config.prediction_type)
        return (x0 if convert is None else convert(x0, z, alpha, ratio * alpha),)


def gaussian_sampler(sampler, prediction_type="sample", schedule="linear"):
    base = tiny_teacher()
    scheduler = RCFDScheduler(1001, prediction_type=prediction_type, beta_schedule=schedule)
    pipeline = StockSamplerPipeline(base.unet, scheduler, sampler=sampler)
    pipeline.set_progress_bar_config(disable=True)
    network = GaussianNetwork(scheduler)
    pipeline.unet.forward = network  # in the network's place
    return pipeline, network


NOISE = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", STOCK_SAMPLERS)
def test_samplers_reach_the_closed_form_flow_of_a_gaussian(sampler, prediction_type):
    """x0 = mean + std z_T is where the probability flow ends; every sampler must arrive there in many steps."""
    pipeline, network = gaussian_sampler(sampler, prediction_type)
    images = pipeline(64, 201, latents=NOISE, output_type="pt").images
    exact = ((network.mean + network.std * NOISE) / 2 + 0.5).clamp(0, 1)
    assert network.calls == 201
    assert (images - exact).abs().max() < 0.02
    assert (pipeline(64, 1, latents=NOISE, output_type="pt").images - exact).abs().max() > 0.02


@pytest.mark.parametrize("sampler", STOCK_SAMPLERS)
def test_evaluations_are_network_calls(sampler):
    pipeline, network = gaussian_sampler(sampler, schedule="squaredcos_cap_v2")
    for number in (1, 2, 3, 4, 5, 8):
        network.calls = 0
        if (sampler, number) == ("pndm", 2) or (sampler == "heun" and number % 2 == 0):
            with pytest.raises(ValueError, match=f"`num_inference_steps`={number} is not possible with"):
                pipeline(64, number, latents=NOISE)
        else:
            pipeline(64, number, latents=NOISE)
            assert network.calls == number


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++1s", "euler"])
def test_first_order_samplers_are_our_ddim(sampler, prediction_type):
    """DDIM, DPM-Solver++ of order 1 and Euler in sigma are one method; they differ in where the last step ends."""
    base = tiny_teacher()
    scheduler = RCFDScheduler(prediction_type=prediction_type, beta_schedule="linear")
    ours = RCFDPipeline(base.unet, scheduler)
    stock = StockSamplerPipeline(base.unet, scheduler, sampler=sampler)
    noise = NOISE[:8]
    for number in (1, 2, 4, 8):
        expected = ours(8, number, latents=noise, output_type="pt").images
        images = stock(8, number, latents=noise, output_type="pt").images
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-4 if sampler == "ddim" else 0.02)


def test_class_conditional_models_keep_their_labels():
    base = tiny_teacher(num_class_embeds=3)
    pipeline = StockSamplerPipeline(base.unet, base.scheduler, sampler="dpm++2m")
    noise = NOISE[:2]
    zero, one = (pipeline(2, 2, latents=noise, class_labels=[c, c], output_type="pt").images for c in (0, 1))
    assert not torch.equal(zero, one)
    with pytest.raises(ValueError, match="class_labels"):
        pipeline(2, 2, latents=noise)


def test_student_of_sfd_is_no_base_model():
    student = tiny_sfd_student()
    with pytest.raises(ValueError, match="`scheduler` must be of a base model, without `nodes`"):
        StockSamplerPipeline(student.unet, student.scheduler)


def test_scheduler_of_diffusers_and_a_wrong_output_type():
    pipeline = StockSamplerPipeline(tiny_teacher().unet, DDIMScheduler())
    assert pipeline(2, 2, output_type="pt").images.shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="`output_type` must be one of .*, got 'jpg'"):
        pipeline(2, 2, output_type="jpg")


def test_unknown_sampler_is_named():
    base = tiny_teacher()
    with pytest.raises(ValueError, match=r"`sampler` must be one of .*'unipc'.*got 'ddpm'"):
        StockSamplerPipeline(base.unet, base.scheduler, sampler="ddpm")
    with pytest.raises(ValueError, match="`num_inference_steps` must be in 1..1024, got 0"):
        StockSamplerPipeline(base.unet, base.scheduler)(1, 0)
