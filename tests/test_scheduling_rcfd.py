import copy
import json
import pickle

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    ScoreSdeVeScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from diffusers_rcfd import RCFDScheduler
from diffusers_rcfd.schedulers.noise_schedules import BETA_SCHEDULES
from diffusers_rcfd.schedulers.scheduling_rcfd import (
    PREDICTION_TYPES,
    ddim_coefficients,
    eps_from_x0,
    v_from_x0,
    x0_from_eps,
    x0_from_v,
)
from tests.toys import golden, toy_teacher


def sample(scheduler, z, num_inference_steps, network=toy_teacher):
    scheduler.set_timesteps(num_inference_steps)
    for t in scheduler.timesteps:
        z = scheduler.step(network(z, t), t, z).prev_sample
    return z.clamp(-1, 1)


def test_golden_schedule():
    scheduler, expected = RCFDScheduler(), golden("schedule")
    torch.testing.assert_close(scheduler.alpha, expected["alpha"], rtol=0, atol=1e-6)
    torch.testing.assert_close(scheduler.sigma, expected["sigma"], rtol=0, atol=1e-6)
    assert scheduler.sigma[0].item() == pytest.approx(0.0063, abs=5e-5)


@pytest.mark.parametrize("clip", [0, 1])
@pytest.mark.parametrize("N", [1, 2, 4, 8, 16, 1024])
def test_golden_ddim(N, clip):
    expected = golden("ddim")
    x = sample(RCFDScheduler(clip_sample=bool(clip)), expected["z_T"], N)
    torch.testing.assert_close(x, expected[f"x_N{N}_clip{clip}"], rtol=0, atol=1e-4 if N == 1024 else 1e-5)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("N", [2**k for k in range(11)])
def test_agrees_with_stock_ddim(N, prediction_type):
    """The configuration that a saved pipeline carries, in float64 to leave only the stock float32 schedule."""
    ours = RCFDScheduler(prediction_type=prediction_type, num_inference_steps=N)
    stock = ours.to_ddim()
    assert stock.config.steps_offset == 1024 // N and stock.config.set_alpha_to_one is False
    stock.set_timesteps(N)
    ours.set_timesteps()
    assert stock.timesteps.tolist() == ours.timesteps.tolist()

    # Step by step from noisy images; what is left is the stock schedule's float32, 6e-7 of alpha_bar.
    x0, eps = torch.randn((2, 2, 3, 8, 8), generator=torch.Generator().manual_seed(N), dtype=torch.float64)
    x0 = x0.clamp(-1, 1)
    for t in ours.timesteps:
        at = t.expand(2)
        z, v = ours.add_noise(x0, eps, at), ours.get_velocity(x0, eps, at)
        output = {"sample": x0, "epsilon": eps, "v_prediction": v}[prediction_type]
        expected = stock.step(output, t, z, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(ours.step(output, t, z).prev_sample, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("N", [2**k for k in range(11)])
def test_samples_agree_with_stock_ddim(N):
    ours = RCFDScheduler(num_inference_steps=N)
    stock, z = ours.to_ddim(), golden("ddim")["z_T"]
    stock.set_timesteps(N)
    expected = z
    for t in stock.timesteps:
        expected = stock.step(toy_teacher(expected, t), t, expected, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(sample(ours, z, N), expected.clamp(-1, 1), rtol=0, atol=1e-4)


def test_grids_nest_and_end_at_zero():
    for n in (1025, 1000, 50):
        scheduler = RCFDScheduler(num_train_timesteps=n)
        for N in range(1, (n - 1) // 2 + 1):
            grid = scheduler.grid(N)
            assert grid[0] == 0 and grid[-1] == n - 1 and sorted(set(grid)) == grid
            assert grid == scheduler.grid(2 * N)[::2]


@given(n=st.integers(3, 5000), data=st.data())
def test_grids_nest_for_every_schedule_length(n, data):
    N = data.draw(st.integers(1, (n - 1) // 2))
    scheduler = RCFDScheduler(num_train_timesteps=n, num_inference_steps=1)
    grid = scheduler.grid(N)
    assert grid == scheduler.grid(2 * N)[::2]
    assert grid[0] == 0 and grid[-1] == n - 1 and all(s < t for s, t in zip(grid, grid[1:], strict=False))


PIXELS = st.floats(-1, 1, width=32)
NOISE = st.floats(-5, 5, width=32)


@given(N=st.integers(1, 1024), prediction_type=st.sampled_from(PREDICTION_TYPES), x0=PIXELS, eps=NOISE, data=st.data())
def test_step_and_its_inversion_give_back_where_they_began(N, prediction_type, x0, eps, data):
    scheduler = RCFDScheduler(prediction_type=prediction_type, num_inference_steps=N, clip_sample=False)
    k = data.draw(st.integers(1, N))
    s, t = scheduler.grid(N)[k - 1 : k + 1]
    x0, eps = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (x0, eps))
    z_t, v = scheduler.add_noise(x0, eps, torch.tensor([t])), scheduler.get_velocity(x0, eps, torch.tensor([t]))
    outputs = {"sample": x0, "epsilon": eps, "v_prediction": v, "flow_prediction": eps - x0}
    step = scheduler.step(outputs[prediction_type], t, z_t)
    a, b = ddim_coefficients(scheduler.alpha[s], scheduler.sigma[s], scheduler.alpha[t], scheduler.sigma[t])
    torch.testing.assert_close(a * step.pred_original_sample + b * step.prev_sample, z_t, rtol=0, atol=1e-9)


@given(x0=PIXELS, eps=NOISE, beta_schedule=st.sampled_from(BETA_SCHEDULES))
def test_conversions_round_trip_in_float32_over_the_whole_grid(x0, eps, beta_schedule):
    """To 1e-4. Where alpha is below 0.01 (the cosine's t from 1018 on), z_t in float32 hardly holds x0, and what comes
    from dividing by alpha is held to 1e-4 of 0.01 / alpha, up to 2 % at the last t."""
    scheduler, t = RCFDScheduler(beta_schedule=beta_schedule, num_inference_steps=1), torch.arange(1025)
    x0, eps = torch.full((1025, 1), x0), torch.full((1025, 1), eps)
    alpha, sigma = scheduler.alpha_sigma(t, x0)
    z, v = scheduler.add_noise(x0, eps, t), scheduler.get_velocity(x0, eps, t)
    assert z.dtype == v.dtype == torch.float32
    back = [
        (x0_from_v(v_from_x0(x0, z, alpha, sigma), z, alpha, sigma), x0, 1),
        (v_from_x0(x0_from_v(v, z, alpha, sigma), z, alpha, sigma), v, 1),
        (eps_from_x0(x0_from_eps(eps, z, alpha, sigma), z, alpha, sigma), eps, 1),
        (eps_from_x0(x0_from_v(v, z, alpha, sigma), z, alpha, sigma), eps, 1),
        (x0_from_eps(eps_from_x0(x0, z, alpha, sigma), z, alpha, sigma), x0, (alpha / 0.01).clamp(max=1)),
    ]
    for value, expected, scale in back:
        assert ((value - expected).abs() * scale).max() <= 1e-4


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(1e-4, 0.03, 1000).tolist()},
        {"beta_schedule": "linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
)
@pytest.mark.parametrize("stock_class", [DDIMScheduler, DDPMScheduler])
def test_from_config_keeps_the_stock_schedule(stock_class, config):
    stock = stock_class(**config)
    ours = RCFDScheduler.from_config(stock.config)
    assert ours.config.prediction_type == stock.config.prediction_type
    assert ours.config.num_train_timesteps == 1000
    torch.testing.assert_close(ours.alphas_cumprod.float(), stock.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_from_config_of_a_plain_stock_default_is_linear_epsilon():
    """Values that the stock class took by default must not become our defaults."""
    for stock in (DDPMScheduler(), DDIMScheduler(), PNDMScheduler()):
        config = RCFDScheduler.from_config(stock.config).config
        assert (config.beta_schedule, config.prediction_type) == ("linear", "epsilon")


def test_what_an_old_config_leaves_out_is_its_class_default():
    """The file that google/ddpm-cifar10-32 has says nothing of its prediction, which is epsilon."""
    old = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_start": 0.0001, "beta_end": 0.02,
           "beta_schedule": "linear", "num_train_timesteps": 1000, "trained_betas": None, "clip_sample": True,
           "variance_type": "fixed_large"}  # fmt: skip
    assert RCFDScheduler.from_config(old).config.prediction_type == "epsilon"


@pytest.mark.parametrize(
    "stock, message",
    [
        (EDMEulerScheduler(), "EDMEulerScheduler cannot be converted.*`sigma_data`=0.5.*whole pipeline"),
        (CMStochasticIterativeScheduler(), "`sigma_data`=0.5"),
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler cannot be converted, it has no betas"),
        (ScoreSdeVeScheduler(), "ScoreSdeVeScheduler cannot be converted, it has no betas"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "`use_flow_sigmas=True` is flow matching"),
        (
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            "`timestep_type='continuous'`",
        ),
        (EulerDiscreteScheduler(prediction_type="sample", beta_schedule="linear"), None),
    ],
)
def test_schedulers_of_another_process_are_refused_and_say_why(stock, message, tmp_path):
    stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    if message is None:
        assert RCFDScheduler.from_config(config).config.prediction_type == "sample"
        return
    for source in (config, {"_class_name": type(stock).__name__, **stock.config}):
        with pytest.raises(ValueError, match=f"`scheduler` must have betas.*{message}"):
            RCFDScheduler.from_config(source)


def test_thresholding_is_the_stock_schedulers():
    options = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0}
    ours, plain = RCFDScheduler(num_inference_steps=4, **options), RCFDScheduler(num_inference_steps=4)
    stock = ours.to_ddim()
    stock.set_timesteps(4)
    z, output = 2 * torch.randn((2, 3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    for t in ours.timesteps:
        expected = stock.step(output, t, z, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(ours.step(output, t, z).prev_sample, expected, rtol=0, atol=1e-4)
        assert not torch.allclose(plain.step(output, t, z).prev_sample, expected, atol=1e-2)
    again = RCFDScheduler.from_config(stock.config).config
    assert {name: again[name] for name in options} == options


def test_stock_from_our_config_keeps_the_schedule():
    ours = RCFDScheduler()
    stock = DDIMScheduler.from_config(ours.config)
    assert (stock.config.beta_schedule, stock.config.prediction_type) == ("squaredcos_cap_v2", "sample")
    torch.testing.assert_close(ours.alphas_cumprod.float(), stock.alphas_cumprod, rtol=1e-3, atol=1e-6)


def test_sigmoid_schedule_survives_the_stock_form():
    stock = DDPMScheduler(beta_schedule="sigmoid")
    ours = RCFDScheduler.from_config(stock.config)
    torch.testing.assert_close(ours.alphas_cumprod.float(), stock.alphas_cumprod, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.to_ddim().alphas_cumprod, stock.alphas_cumprod, rtol=1e-4, atol=1e-6)
    ours = RCFDScheduler(beta_schedule="sigmoid", rescale_betas_zero_snr=True)
    again = RCFDScheduler.from_config(ours.to_ddim().config)
    torch.testing.assert_close(again.alphas_cumprod, ours.alphas_cumprod)
    assert again.alpha[-1] == 0


def test_save_and_load(tmp_path):
    RCFDScheduler(num_inference_steps=4, prediction_type="v_prediction").save_pretrained(tmp_path / "ours")
    ours = RCFDScheduler.from_pretrained(tmp_path / "ours")
    assert ours.config.num_inference_steps == 4 and len(ours.timesteps) == 4
    ours.to_ddim().save_pretrained(tmp_path / "stock")
    again = RCFDScheduler.from_pretrained(tmp_path / "stock")
    assert again.config.num_inference_steps == 4 and again.config.prediction_type == "v_prediction"


def test_closed_form_conversions_over_the_whole_grid():
    scheduler = RCFDScheduler()
    t = torch.arange(1025)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn((2, 1025, 1, 2, 2), generator=generator, dtype=torch.float64)
    alpha, sigma = scheduler.alpha_sigma(t, x0)
    z, v = scheduler.add_noise(x0, eps, t), scheduler.get_velocity(x0, eps, t)
    torch.testing.assert_close(z, alpha * x0 + sigma * eps)
    torch.testing.assert_close(v, alpha * eps - sigma * x0)
    torch.testing.assert_close(x0_from_v(v, z, alpha, sigma), x0)
    torch.testing.assert_close(v_from_x0(x0, z, alpha, sigma), v, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(eps_from_x0(x0, z, alpha, sigma), eps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x0_from_eps(eps, z, alpha, sigma), x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_closed_form_of_a_perfect_network(prediction_type):
    """A network that knows x0 leads from any z_t to alpha_0 x0 + sigma_0 eps exactly, in any number of steps."""
    scheduler = RCFDScheduler(prediction_type=prediction_type, clip_sample=False)
    generator = torch.Generator().manual_seed(1)
    x0, eps = torch.randn((2, 3, 1, 4, 4), generator=generator, dtype=torch.float64)
    everywhere = torch.full((3,), 1024)
    z = scheduler.add_noise(x0, eps, everywhere)

    def network(z, t):
        t = torch.full((3,), int(t))
        return {"sample": x0, "epsilon": eps, "v_prediction": scheduler.get_velocity(x0, eps, t)}[prediction_type]

    scheduler.set_timesteps(7)
    for t in scheduler.timesteps:
        output = network(z, t)
        result = scheduler.step(output, t, z)
        torch.testing.assert_close(result.pred_original_sample, x0, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(scheduler.predict_x0(output, z, t.expand(3)), x0, rtol=1e-6, atol=1e-6)
        z = result.prev_sample
    expected = scheduler.add_noise(x0, eps, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)


def test_step_takes_any_timestep_of_the_grid_in_any_order():
    scheduler = RCFDScheduler()
    scheduler.set_timesteps(4)
    z, out = torch.randn(2, 1, 1, 4, 4)
    first = scheduler.step(out, 256, z).prev_sample
    scheduler.step(out, 1024, z)
    scheduler.step(out, torch.tensor(768), z)
    torch.testing.assert_close(scheduler.step(out, 256, z, return_dict=False)[0], first)


def test_step_on_an_accelerator_reads_nothing_back():
    """On the meta device reading a value raises, so a step that passes there never waits for a device."""
    scheduler = RCFDScheduler()
    scheduler.set_timesteps(4, device="meta")
    z = torch.empty(2, 3, 8, 8, device="meta")
    for t in scheduler.timesteps:
        z = scheduler.step(torch.empty_like(z), t, z).prev_sample
    assert z.shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prediction_type": "x0"}, r"`prediction_type` must be one of .* got 'x0'"),
        ({"beta_schedule": "quadratic"}, r"`beta_schedule` must be one of .* got 'quadratic'"),
        ({"num_train_timesteps": 1}, r"`num_train_timesteps` must be an integer of at least 2, got 1"),
        ({"trained_betas": [0.1, 0.2]}, r"`trained_betas` must hold `num_train_timesteps`=1025 values"),
        ({"beta_schedule": "linear", "beta_start": 0.5, "beta_end": 0.1}, "0 < beta_start <= beta_end < 1"),
        ({"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "`rescale_betas_zero_snr=True`"),
        ({"dynamic_thresholding_ratio": 0}, r"`dynamic_thresholding_ratio` must be in \(0, 1\], got 0"),
        ({"thresholding": True, "sample_max_value": 0.5}, "`sample_max_value` must be at least 1, got 0.5"),
        ({"num_inference_steps": 1025}, r"`num_inference_steps` must be an integer in 1\.\.1024, got 1025"),
        ({"num_inference_steps": 0}, r"`num_inference_steps` must be an integer in 1\.\.1024, got 0"),
        ({"num_inference_steps": -1}, r"`num_inference_steps` must be an integer in 1\.\.1024, got -1"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=message):
        RCFDScheduler(**options)


def test_bad_step_counts():
    student = RCFDScheduler(num_inference_steps=4)
    student.set_timesteps(2)
    for wrong in (8, 3):
        with pytest.raises(ValueError, match=rf"must be one of \[1, 2, 4\].* 4 steps, got {wrong}"):
            student.set_timesteps(wrong)
    with pytest.raises(ValueError, match=r"in 1\.\.1024, got 0"):
        RCFDScheduler().set_timesteps(0)
    with pytest.raises(ValueError, match=r"`timestep` must be one of \[512, 1024\], got 500"):
        student.step(torch.zeros(1, 1, 2, 2), 500, torch.zeros(1, 1, 2, 2))


NODES = [[1016, 964, 379, 0], [1016, 990, 700, 379, 0]]


def test_nodes_are_counted_as_network_evaluations():
    scheduler = RCFDScheduler(nodes=NODES)
    assert scheduler.trained_steps == [3, 4] and scheduler.timesteps.tolist() == NODES[1][:-1]  # the most by default
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == [1016, 964, 379] and scheduler.init_noise_sigma == 1
    with_afs = RCFDScheduler(nodes=NODES, analytical_first_step=True, num_inference_steps=2)
    assert with_afs.trained_steps == [2, 3] and with_afs.timesteps.tolist() == [964, 379]
    for wrong in (1, 4, 0, True):
        with pytest.raises(ValueError, match=rf"`num_inference_steps` must be one of \[2, 3\].* got {wrong}"):
            with_afs.set_timesteps(wrong)


@pytest.mark.parametrize("data_std", [1.0, 0.5])
def test_closed_form_analytical_first_step_scales_the_noise(data_std):
    """The DDIM step with eps = z, which changes with the second node."""
    scheduler = RCFDScheduler(nodes=NODES, analytical_first_step=True, data_std=data_std)
    z = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    for N, k in ((2, 964), (3, 990)):
        scheduler.set_timesteps(N)
        (a, a_k), (s, s_k) = scheduler.alpha[[1016, k]], scheduler.sigma[[1016, k]]
        torch.testing.assert_close(scheduler.init_noise_sigma * z, a_k * (z - s * z) / a + s_k * z, rtol=1e-9, atol=0)


def test_steps_between_nodes_are_ddim_steps():
    scheduler = RCFDScheduler(nodes=NODES, clip_sample=False)
    scheduler.set_timesteps(3)
    z, x0 = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    for t, s in ((1016, 964), (964, 379), (379, 0)):
        eps = (z - scheduler.alpha[t] * x0) / scheduler.sigma[t]
        z = scheduler.step(x0, t, z).prev_sample
        torch.testing.assert_close(z, scheduler.alpha[s] * x0 + scheduler.sigma[s] * eps)


def test_nodes_survive_the_stock_config(tmp_path):
    scheduler = RCFDScheduler(nodes=NODES, analytical_first_step=True, num_inference_steps=2, clip_sample=False)
    stock = scheduler.to_dpm_solver()
    stock.save_pretrained(tmp_path)
    again = RCFDScheduler.from_config(type(stock).from_pretrained(tmp_path).config)
    for name in ("nodes", "analytical_first_step", "num_inference_steps", "clip_sample", "prediction_type"):
        assert again.config[name] == scheduler.config[name]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"nodes": [[1016, 379, 964, 0]]}, r"`nodes` must be .* in 0\.\.1024 that fall, got \[1016, 379, 964, 0\]"),
        ({"nodes": [[1016, 1016, 0]]}, "that fall"),
        ({"nodes": [[1025, 0]]}, "that fall"),
        ({"nodes": [[1016, -1]]}, "that fall"),
        ({"nodes": [[1016]]}, "lists of 2 or more indices"),
        ({"nodes": [[1016, 0]], "analytical_first_step": True}, "lists of 3 or more indices"),
        ({"nodes": [[1016, 0], [900, 0]]}, "`nodes` must have a length of its own in each list"),
        ({"analytical_first_step": True}, "`analytical_first_step` must be False without `nodes`"),
        ({"nodes": NODES, "num_inference_steps": 8}, r"`num_inference_steps` must be one of \[3, 4\].* got 8"),
    ],
)
def test_bad_nodes(options, message):
    with pytest.raises(ValueError, match=message):
        RCFDScheduler(**options)


def test_scheduler_can_be_copied_and_pickled_in_mid_sampling():
    scheduler = RCFDScheduler()
    scheduler.set_timesteps(4)
    z, first, second = torch.randn(2, 3, 8, 8), *scheduler.timesteps[:2]
    scheduler.step(z, first, z)
    expected = scheduler.step(z, second, z).prev_sample
    for other in (copy.deepcopy(scheduler), copy.copy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(other.step(z, second, z).prev_sample, expected)


def test_step_takes_what_stock_pipelines_pass():
    scheduler = RCFDScheduler()
    scheduler.set_timesteps(2)
    z, t = torch.randn(2, 3, 8, 8), scheduler.timesteps[0]
    options = {"eta": 0.0, "use_clipped_model_output": True, "generator": None}
    assert torch.equal(scheduler.step(z, t, z, **options).prev_sample, scheduler.step(z, t, z).prev_sample)
    with pytest.raises(ValueError, match="`eta` must be 0, got 0.5"):
        scheduler.step(z, t, z, eta=0.5)


def test_one_timestep_for_all_images():
    scheduler, x0, noise = RCFDScheduler(), torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    one, each = (scheduler.add_noise(x0, noise, t) for t in (torch.tensor(700), torch.full((3,), 700)))
    assert torch.equal(one, each)


def test_entry_of_the_timesteps_on_a_device_is_known_by_its_place():
    """On the meta device no number can be read back."""
    scheduler = RCFDScheduler()
    scheduler.set_timesteps(4, device="meta")
    assert [scheduler._index(t) for t in scheduler.timesteps] == [1024, 768, 512, 256]
    assert scheduler._index(scheduler.timesteps[2]) == 512
