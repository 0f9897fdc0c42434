"""Any teacher on the cosine grid with 1025 entries: the same denoised images at the same noise levels."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    ScoreSdeVeScheduler,
    UNet2DModel,
)
from diffusers.training_utils import EMAModel
from diffusers.utils.logging import disable_propagation, enable_propagation

from diffusers_rcfd import RCFDPipeline, RCFDScheduler
from diffusers_rcfd.models.adoption import adopt_unet, find_index, log_ratio, needs_adoption
from diffusers_rcfd.models.edm import from_edm
from diffusers_rcfd.schedulers.noise_schedules import cosine_betas, prediction_coefficients
from tests.toys import tiny_unet

LEVELS = (0, 1, 37, 500, 803, 1000, 1024)
X0 = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
NOISE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def config_of(scheduler):
    return {"_class_name": type(scheduler).__name__, **scheduler.config}


@functools.cache
def network(**overrides):
    torch.manual_seed(0)
    return tiny_unet(**overrides).eval()


@torch.no_grad()
def denoise(unet, scheduler, k, labels=None):
    """D at our index k, for the image X0 with NOISE; and its noise level nu."""
    t = torch.full((len(X0),), k)
    z = scheduler.add_noise(X0, NOISE, t)
    x0 = scheduler.predict_x0(unet(scheduler.scale_model_input(z, t), t, labels).sample, z, t)
    return x0, (scheduler.sigma[k] / scheduler.alpha[k]).item()


STOCK = {
    "DDPM, epsilon, linear": DDPMScheduler(),
    "DDIM, epsilon, scaled-linear": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "DDIM, v, zero SNR": DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "DDPM, x0, cosine": DDPMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2"),
    "DDPM, v, sigmoid": DDPMScheduler(prediction_type="v_prediction", beta_schedule="sigmoid"),
    "PNDM, epsilon": PNDMScheduler(),
    "DPM-Solver, epsilon": DPMSolverMultistepScheduler(),
    "Euler, v": EulerDiscreteScheduler(prediction_type="v_prediction"),
    "Heun, epsilon": HeunDiscreteScheduler(),
    "ours, v, linear": RCFDScheduler(513, beta_schedule="linear", prediction_type="v_prediction"),
}


@pytest.mark.parametrize("name, embedding", [*((name, "positional") for name in STOCK), ("Euler, v", "learned")])
@torch.no_grad()
def test_closed_form_of_stock_teachers(name, embedding):
    """Against the original network, asked for the fractional index that NumPy interpolates."""
    config = config_of(STOCK[name])
    unet = network(time_embedding_type=embedding, num_train_timesteps=1000)
    theirs = RCFDScheduler.from_config(config)
    adopted, scheduler = adopt_unet(unet, config)
    assert len(scheduler) == 1025 and scheduler.config.prediction_type == theirs.config.prediction_type
    assert scheduler.alphas_cumprod.equal((1 - cosine_betas(1025)).cumprod(0))
    log_nu = (theirs.sigma.log() - theirs.alpha.log()).numpy()
    for k in LEVELS:
        x0, nu = denoise(adopted, scheduler, k)
        if math.isinf(log_nu[-1]) and math.log(nu) > log_nu[-2]:
            continue  # next to zero SNR: see below
        index = np.interp(math.log(nu), log_nu, np.arange(len(log_nu)))
        if embedding == "positional":
            output = unet(z_at(nu), torch.tensor(index, dtype=torch.float32)).sample
        else:
            output = with_row(unet, index)(z_at(nu), 0).sample
        alpha, sigma = 1 / math.hypot(1, nu), nu / math.hypot(1, nu)
        expected = {
            "epsilon": (z_at(nu) - sigma * output) / alpha,
            "v_prediction": alpha * z_at(nu) - sigma * output,
            "sample": output,
        }[theirs.config.prediction_type]
        torch.testing.assert_close(x0 * min(alpha, 1), expected * min(alpha, 1), **CLOSE)


def z_at(nu):
    return (X0 + nu * NOISE) / math.hypot(1, nu)


def with_row(unet, index):
    """The network whose first row is the one at a fractional index."""
    low, high = math.floor(index), math.ceil(index)
    table = unet.time_proj.weight
    row = table[low] + (index - low) * (table[high] - table[low])
    changed = copy.deepcopy(unet)
    changed.load_state_dict(unet.state_dict() | {"time_proj.weight": row.expand_as(table)})
    return changed


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
@torch.no_grad()
def test_closed_form_at_shared_levels(predicts):
    """A teacher of every fourth level of our schedule: index j of its is index 4 j of ours, to the last digits."""
    shared = (1 - cosine_betas(1025)).cumprod(0)[::4]
    betas = 1 - shared / torch.cat([torch.ones(1, dtype=torch.float64), shared[:-1]])
    theirs = RCFDScheduler(257, trained_betas=betas.tolist(), prediction_type=predicts)
    unet = network()
    adopted, scheduler = adopt_unet(unet, dict(theirs.config))
    for j in (0, 1, 100, 201, 256):
        ours, _ = denoise(adopted, scheduler, 4 * j)
        original, _ = denoise(unet, theirs, j)
        torch.testing.assert_close(ours, original, rtol=1e-5, atol=1e-5 * max(original.abs().max().item(), 1))


def test_closed_form_of_the_index():
    """It rises with the noise, in steps without a jump, and reaches the last entry where there is no signal left."""
    ours = log_ratio(RCFDScheduler())
    for theirs in map(RCFDScheduler.from_config, map(config_of, STOCK.values())):
        index = find_index(log_ratio(theirs), ours)
        rises = index.diff()
        assert index.min() >= 0 and index.max() <= len(theirs) - 1
        assert rises.min() >= 0 and rises.max() < 0.03 * len(theirs)
    falling = torch.tensor([2.0, 1.0, -math.inf], dtype=torch.float64)
    wanted = torch.tensor([3.0, 1.5, 1.0, 1 - math.log(2), -math.inf], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(find_index(falling, wanted), expected)


def test_settings_are_carried_over():
    theirs = DDPMScheduler(clip_sample_range=2.0, thresholding=True, sample_max_value=1.5)
    unet = copy.deepcopy(network())
    adopted, scheduler = adopt_unet(unet.half(), config_of(theirs))
    config = scheduler.config
    assert (config.clip_sample_range, config.thresholding, config.sample_max_value) == (2.0, True, 1.5)
    assert config.num_inference_steps is None and not adopted.training and adopted.dtype == torch.float16
    assert adopt_unet(unet.float().train(), config_of(theirs))[0].training
    assert not adopt_unet(network(), config_of(DDIMScheduler(clip_sample=False)))[1].config.clip_sample


@torch.no_grad()
def test_class_conditional_network_of_oblong_images():
    unet = network(sample_size=(8, 16), num_class_embeds=10)
    theirs = RCFDScheduler.from_config(config_of(DDPMScheduler()), prediction_type="v_prediction")
    adopted, scheduler = adopt_unet(unet, dict(theirs.config))
    assert adopted.config.sample_size == (8, 16) and adopted.config.num_class_embeds == 10
    z, labels = torch.randn(2, 1, 8, 16), torch.tensor([3, 7])
    index = find_index(log_ratio(theirs), log_ratio(scheduler))[500]
    torch.testing.assert_close(adopted(z, 500, labels).sample, unet(z, index.float(), labels).sample, **CLOSE)


@torch.no_grad()
def test_weights_of_the_training_script(tmp_path):
    """Diffusers' script saves its average as `unet_ema`, with the arguments of EMAModel in the network's config."""
    unet = network()
    EMAModel(unet.parameters(), model_cls=UNet2DModel, model_config=unet.config).save_pretrained(tmp_path / "unet_ema")
    loaded = UNet2DModel.from_pretrained(tmp_path, subfolder="unet_ema")
    assert "optimization_step" in loaded.config
    config = config_of(DDPMScheduler())
    ours, theirs = adopt_unet(loaded, config)[0], adopt_unet(unet, config)[0]
    assert torch.equal(ours(NOISE, 7).sample, theirs(NOISE, 7).sample)


def test_plain_diffusers_samples_an_adopted_teacher(tmp_path):
    theirs = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    ours = RCFDPipeline(*adopt_unet(network(), config_of(theirs)))
    ours.scheduler.register_to_config(num_inference_steps=4)  # which gives the stock scheduler our grid
    ours.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    options = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"}
    expected = ours(**options, generator=torch.manual_seed(3)).images
    images = stock(**options, generator=torch.manual_seed(3), use_clipped_model_output=True).images
    assert type(stock) is DDIMPipeline and abs(images - expected).max() < 1e-5


@torch.no_grad()
def test_variance_is_dropped_where_the_config_has_one():
    unet = network(out_channels=2)
    for kind in ("learned", "learned_range"):
        adopted, _ = adopt_unet(unet, config_of(DDPMScheduler(variance_type=kind)))
        assert adopted.config.out_channels == 1
        torch.testing.assert_close(adopted(NOISE, 0).sample, unet(NOISE, 0).sample[:, :1])
    with pytest.raises(ValueError, match="`unet` must have as many `out_channels` as .*, got 2 and 'fixed_small'"):
        adopt_unet(unet, config_of(DDPMScheduler()))


@pytest.mark.parametrize("kind", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_closed_form_of_edm(kind, predicts):
    stock = kind(prediction_type=predicts)
    unet = network()
    adopted, scheduler = adopt_unet(unet, config_of(stock))
    converted, grid = from_edm(unet, stock.config)
    again, _ = adopt_unet(converted, dict(grid.config))
    assert scheduler.config.data_std == 0.5 and not scheduler.config.clip_sample
    for k in (1, 37, 500, 803, 1000):
        x0, nu = denoise(adopted, scheduler, k)
        x = X0 + nu * NOISE
        output = unet(stock.precondition_inputs(x, nu), stock.precondition_noise(torch.tensor(nu))).sample
        torch.testing.assert_close(x0, stock.precondition_outputs(x, output, nu), **CLOSE)
        torch.testing.assert_close(denoise(again, scheduler, k)[0], x0, **CLOSE)  # by way of EDM's own grid


@torch.no_grad()
def test_closed_form_of_continuous_euler():
    options = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    stock = EulerDiscreteScheduler(sigma_min=0.002, sigma_max=700.0, **options)
    unet = network()
    adopted, scheduler = adopt_unet(unet, config_of(stock))
    for k in (0, 500, 1000):
        x0, nu = denoise(adopted, scheduler, k)
        x = X0 + nu * NOISE
        output = unet(x / math.hypot(nu, 1), torch.tensor(math.log(nu) / 4)).sample
        torch.testing.assert_close(x0, x / (nu**2 + 1) - nu / math.hypot(nu, 1) * output, **CLOSE)
    _, noisiest = adopt_unet(unet, config_of(EulerDiscreteScheduler(**options)))  # levels of its betas
    assert noisiest.config.prediction_type == "v_prediction"


@torch.no_grad()
def test_closed_form_of_flow_matching():
    unet = network(num_class_embeds=3)
    labels = torch.tensor([0, 2])
    adopted, scheduler = adopt_unet(unet, config_of(FlowMatchEulerDiscreteScheduler(shift=3.0)))
    for k in LEVELS:
        x0, nu = denoise(adopted, scheduler, k, labels)
        t = nu / (1 + nu)
        x_t = (1 - t) * X0 + t * NOISE
        velocity = unet(x_t, torch.tensor(1000 * t), labels).sample
        torch.testing.assert_close(x0, x_t - t * velocity, **CLOSE)
    scheduler.set_timesteps(4)
    z = scheduler.add_noise(X0, NOISE, torch.tensor([1024, 1024]))
    expected = denoise(adopted, scheduler, 1024, labels)[0].clamp(-1, 1)
    output = adopted(scheduler.scale_model_input(z, 1024), 1024, labels).sample
    stepped = scheduler.step(output, 1024, z).pred_original_sample.clamp(-1, 1)
    torch.testing.assert_close(stepped, expected, **CLOSE)


@pytest.mark.parametrize("predicts", ["sample", "epsilon", "v_prediction", "flow_prediction"])
def test_closed_form_of_prediction_coefficients(predicts):
    """A network that knows image and noise gives back the image."""
    alpha, sigma, x0, eps = (torch.tensor(value, dtype=torch.float64) for value in (0.6, 0.8, -0.3, 1.7))
    c_in, c_z, c_out = prediction_coefficients(alpha, sigma, predicts)
    z = alpha * x0 + sigma * eps
    output = {"sample": x0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "flow_prediction": eps - x0}
    torch.testing.assert_close(c_z * z + c_out * output[predicts], x0)
    t = sigma / (alpha + sigma)
    torch.testing.assert_close(c_in * z, (1 - t) * x0 + t * eps if predicts == "flow_prediction" else z)
    with pytest.raises(ValueError, match="`prediction_type` must be .*, got 'noise'"):
        prediction_coefficients(alpha, sigma, "noise")


@pytest.mark.parametrize(
    "scheduler, reason",
    [
        (DDPMScheduler(), "it predicts epsilon"),
        (RCFDScheduler(prediction_type="epsilon"), "it predicts epsilon"),
        (DDPMScheduler(prediction_type="sample"), "not the cosine one with 1025 entries"),
        (DDPMScheduler(1000, prediction_type="sample", beta_schedule="squaredcos_cap_v2"), "not the cosine one"),
        (DDPMScheduler(1025, prediction_type="sample", beta_schedule="squaredcos_cap_v2"), None),
        (RCFDScheduler(prediction_type="v_prediction"), None),
        (RCFDScheduler(data_std=0.5), None),
        (RCFDScheduler(rescale_betas_zero_snr=True), "not the cosine one"),
        (EDMEulerScheduler(), "takes ln(sigma) / 4"),
        (FlowMatchEulerDiscreteScheduler(), "velocity of flow matching"),
    ],
)
def test_what_needs_adoption(scheduler, reason):
    found = needs_adoption(config_of(scheduler))
    assert found is None if reason is None else reason in found


def test_levels_beyond_the_teachers_are_logged(caplog):
    enable_propagation()
    try:
        adopt_unet(network(), config_of(DDPMScheduler()))
        text = caplog.text
        caplog.clear()
        adopt_unet(network(), config_of(RCFDScheduler()))
    finally:
        disable_propagation()
    assert "lie beyond the teacher's noisiest one, which has sigma / alpha = 157.4" in text
    assert "lie beyond the teacher's cleanest one, which has sigma / alpha = 0.01:" in text
    assert not caplog.text


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (ScoreSdeVeScheduler(), "ScoreSdeVeScheduler cannot be converted, it has no betas"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "cannot be converted, it has no betas"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "`use_flow_sigmas=True` is flow matching"),
        (RCFDScheduler(num_inference_steps=4), "of a base model, got one of a student of 4 steps"),
        (
            RCFDScheduler(3, trained_betas=[0.1, 1e-18, 0.1]),
            r"falling ln\(alpha / sigma\), got 1.09861 at index 0 and",
        ),
        (EDMEulerScheduler(sigma_min=80, sigma_max=80), "`sigma_min` and `sigma_max` must satisfy"),
    ],
)
def test_teachers_that_no_map_describes(scheduler, message):
    with pytest.raises(ValueError, match=message):
        adopt_unet(network(), config_of(scheduler))


def test_network_whose_embedding_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a `num_train_timesteps` of at least 1000, got 500"):
        adopt_unet(network(time_embedding_type="learned", num_train_timesteps=500), config_of(DDPMScheduler()))
    with pytest.raises(ValueError, match="`time_embedding_type` 'positional' or 'learned', got 'fourier'"):
        adopt_unet(network(time_embedding_type="fourier"), config_of(DDPMScheduler()))
