import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from diffusers_rcfd import RCFDScheduler
from diffusers_rcfd.distillation.ladder import ddim_target
from diffusers_rcfd.schedulers.trajectories import (
    analytical_first_step,
    dynamic_threshold,
    euler_step,
    nearest_indices,
    one_step_target,
    rho_nodes,
    solve,
    subdivide,
)
from tests.toys import golden, toy_teacher


def denoiser(nodes):
    """The golden denoiser in variance-exploding form, at the nodes of a sampler."""
    return lambda x, i: 1.2 * torch.tanh(1.5 * x / (1 + nodes[i] ** 2) ** 0.5)


def assert_near(value, expected):
    """To 1e-4 of the expected array's size, in float32."""
    assert value.dtype == torch.float32
    assert (value - expected).abs().max() < 1e-4 * expected.abs().max()


def noise(size=3, seed=0, dtype=torch.float64):
    return torch.randn((size, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("N", [3, 4, 5, 6, 7])
def test_golden_nodes(N):
    torch.testing.assert_close(rho_nodes(N).float(), golden("sfd")[f"nodes_{N}"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("N", [4, 7])
def test_golden_teacher_trajectory(N):
    data, nodes = golden("sfd"), rho_nodes(N, steps=4).tolist()
    states = solve(denoiser(nodes), 80 * data["eps"], nodes)
    for state, expected in zip(states[4::4], data[f"teacher_traj_{N}"], strict=True):
        assert_near(state, expected)


@pytest.mark.parametrize("afs", [0, 1])
@pytest.mark.parametrize("N", [4, 7])
def test_golden_student_trajectory(N, afs):
    data, nodes = golden("sfd"), rho_nodes(N).tolist()
    states = solve(denoiser(nodes), 80 * data["eps"], nodes, "euler", analytical_first=bool(afs))
    for state, expected in zip(states, data[f"euler_{N}_afs{afs}"], strict=True):
        assert_near(state, expected)


def test_nodes_lie_on_the_indices_of_the_specification():
    scheduler = RCFDScheduler()
    nu = scheduler.sigma / scheduler.alpha
    assert nearest_indices(nu, rho_nodes(4)) == [1016, 964, 379, 0]
    assert nu[1016] == pytest.approx(82.2, abs=0.05) and nu[0] == pytest.approx(0.0063, abs=5e-5)


def test_student_nodes_are_among_the_teachers():
    torch.testing.assert_close(rho_nodes(5, steps=4)[::4], rho_nodes(5))
    torch.testing.assert_close(subdivide(rho_nodes(5), 4), rho_nodes(5, steps=4))
    levels = subdivide(torch.tensor([80.0, 2.0, 0.1]), 3, rho=1.0)
    torch.testing.assert_close(levels, torch.tensor([80, 54, 28, 2, 2 - 1.9 / 3, 2 - 3.8 / 3, 0.1]).double())


@pytest.mark.parametrize("data_std", [1.0, 0.5])
def test_closed_form_variance_preserving_identities(data_std):
    """Euler is the DDIM step, the analytical first step takes z for eps, and D* is the teacher target there."""
    scheduler = RCFDScheduler(data_std=data_std)
    z, x0 = noise(), noise(seed=1)
    t, s = 1016, 964
    (alpha, alpha_s), (sigma, sigma_s) = scheduler.alpha[[t, s]], scheduler.sigma[[t, s]]
    nu, nu_s = (sigma / alpha).item(), (sigma_s / alpha_s).item()
    eps = (z - alpha * x0) / sigma
    step = alpha_s * euler_step(z / alpha, x0, nu, nu_s)
    torch.testing.assert_close(step, alpha_s * x0 + sigma_s * eps, rtol=1e-5, atol=1e-5)
    step = alpha_s * analytical_first_step(z / alpha, nu, nu_s, data_std)
    torch.testing.assert_close(step, (data_std**2 * alpha_s * alpha / (1 + sigma) + sigma_s) * z, rtol=1e-5, atol=1e-5)
    as_eps = alpha_s * (z - sigma * z) / alpha + sigma_s * z  # DDIM with eps = z
    torch.testing.assert_close(step, as_eps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("N, K", [(4, 2), (2, 8)])
def test_closed_form_target_is_the_teacher_target(N, K):
    """D* of K Euler steps from z at the student's node is `ddim_target`, and distances of states are its multiples."""
    scheduler = RCFDScheduler()
    z, k = noise(), torch.full((3,), N)
    grid = scheduler.grid(N * K)[::-1][: K + 1]
    nu = (scheduler.sigma / scheduler.alpha)[grid].tolist()
    alpha = scheduler.alpha[grid]
    x = z / alpha[0]
    target = solve(lambda x, i: toy_teacher(alpha[i] * x, grid[i]), x, nu, "euler")[-1]
    D_star = one_step_target(x, target, nu[0], nu[-1])
    expected = ddim_target(toy_teacher, scheduler, z, k, N, K)
    torch.testing.assert_close(D_star, expected, rtol=1e-5, atol=1e-5)
    D = noise(seed=2)
    distance = euler_step(x, D, nu[0], nu[-1]) - target
    torch.testing.assert_close(distance, (1 - nu[-1] / nu[0]) * (D - D_star), rtol=1e-5, atol=1e-5)


def test_agrees_with_diffusers_below_fifteen_steps():
    """Diffusers' third-order multistep DPM-Solver++ on the same 12 steps; at 24 it keeps the order to the end."""
    ours = RCFDScheduler()
    for N in (4, 7):
        indices = nearest_indices(ours.sigma / ours.alpha, rho_nodes(N, steps=4))
        nu = (ours.sigma / ours.alpha)[indices].tolist()
        z = noise()
        states = solve(lambda x, i, idx=indices: toy_teacher(ours.alpha[idx[i]] * x, idx[i]), z / ours.alpha[1016], nu)
        stock = DPMSolverMultistepScheduler(
            1025, beta_schedule="squaredcos_cap_v2", solver_order=3, prediction_type="sample", thresholding=True,
            sample_max_value=1e9, final_sigmas_type="sigma_min",
        )  # fmt: skip
        stock.set_timesteps(timesteps=indices[:-1])
        for t in stock.timesteps:
            z = stock.step(toy_teacher(z, int(t)), t, z).prev_sample
        error = (z - ours.alpha[0] * states[-1]).abs().max().item()
        assert error < 1e-4 if N == 4 else error > 1e-4


@pytest.mark.parametrize("solver, order, least", [("euler", 1, 0.8), ("dpm-solver++", 2, 1.7), ("heun", 2, 1.7)])
def test_closed_form_order_of_convergence(solver, order, least):
    """For Gaussian data of variance c^2 the flow is known: x grows like sqrt(c^2 + s^2)."""
    c, x, errors = 0.5, noise(), []
    for steps in (32, 64):
        nodes = rho_nodes(steps + 1, 4.0, 0.05).tolist()
        flow = solve(lambda x, i, s=nodes: c**2 / (c**2 + s[i] ** 2) * x, x, nodes, solver, order, thresholding=False)
        exact = x * math.sqrt((c**2 + nodes[-1] ** 2) / (c**2 + nodes[0] ** 2))
        errors.append((flow[-1] - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) > least


def test_closed_form_dynamic_threshold():
    small, large = 0.9 * torch.tanh(noise()), 3 * noise(seed=1)
    torch.testing.assert_close(dynamic_threshold(small, 0.995, math.inf), small)
    q = torch.quantile(large.abs().flatten(1), 0.995, dim=1).view(-1, 1, 1, 1)
    assert (q > 1).all()
    squeezed = dynamic_threshold(large, 0.995, math.inf)
    torch.testing.assert_close(squeezed, (large / q).clamp(-1, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_nodes": 1}, "`num_nodes` must be at least 2, got 1"),
        ({"sigma_min": 80.0}, "`sigma_min` must be above 0 and below `sigma_max`, got sigma_min=80.0"),
        ({"sigma_min": 90.0}, "below `sigma_max`"),
        ({"sigma_min": 0.0}, "`sigma_min` must be above 0"),
        ({"rho": 0}, "`rho` must be above 0, got 0"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
    ],
)
def test_bad_nodes(options, message):
    with pytest.raises(ValueError, match=message):
        rho_nodes(**({"num_nodes": 4} | options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"nodes": [1.0, 2.0]}, r"`nodes` must be noise levels that fall and stay above 0, got \[1.0, 2.0\]"),
        ({"nodes": [1.0, 0.0]}, "`nodes` must be noise levels that fall"),
        ({"solver": "rk4"}, "`solver` must be one of .*, got 'rk4'"),
        ({"order": 4}, "`order` must be 1, 2 or 3, got 4"),
    ],
)
def test_solver_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        solve(lambda x, i: x, noise(), **({"nodes": [2.0, 1.0]} | options))


def test_levels_out_of_order_and_a_schedule_that_cannot_be_inverted():
    with pytest.raises(ValueError, match=r"`nodes` must be two or more noise levels that fall.* \[1.0, 2.0\]"):
        subdivide(torch.tensor([1.0, 2.0]), 2)
    with pytest.raises(ValueError, match="must be invertible.* does not after index 1"):
        nearest_indices(torch.tensor([0.1, 0.3, 0.2, 80.0]), rho_nodes(4))
