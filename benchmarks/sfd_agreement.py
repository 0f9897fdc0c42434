"""How far the trajectories of SFD agree with the authors' numbers, and its two forms with each other: a table."""

from pathlib import Path

import numpy as np
import torch

from diffusers_rcfd import RCFDScheduler
from diffusers_rcfd.distillation.targets import ddim_target
from diffusers_rcfd.schedulers.trajectories import (
    analytical_first_step,
    euler_step,
    nearest_indices,
    one_step_target,
    rho_nodes,
    solve,
)

GOLDEN = Path(__file__).parent.parent / "tests/golden/sfd.npz"


def agreement_table():
    """The largest error against each array of `tests/golden/sfd.npz`, and of the identities in the other form."""
    with np.load(GOLDEN) as arrays:
        golden = {name: torch.from_numpy(arrays[name]) for name in arrays}
    states = {}
    for N in (4, 7):
        nodes, fine = rho_nodes(N).tolist(), rho_nodes(N, steps=4).tolist()
        states[f"teacher_traj_{N}"] = solve(golden_denoiser(fine), 80 * golden["eps"], fine)[4::4]
        for afs in (0, 1):
            options = {"solver": "euler", "analytical_first": bool(afs)}
            states[f"euler_{N}_afs{afs}"] = solve(golden_denoiser(nodes), 80 * golden["eps"], nodes, **options)
    found = {name: rho_nodes(len(golden[name])).float() for name in golden if name.startswith("nodes")}
    found |= {name: torch.stack(list(value)) for name, value in states.items()}
    lines = [f"| `{name}` | {relative_error(value, golden[name]):.1e} | 1e-4 |" for name, value in found.items()]
    lines += [f"| {name} | {relative_error(*pair):.1e} | 1e-5 |" for name, pair in identities().items()]
    head = """Largest error over the largest value of each array that the authors' code gave (`tests/golden/sfd.npz`,
float32, variance-exploding), and between both sides of the identities in the variance-preserving form.

| array or identity | error | goal |
|---|---:|---:|
"""
    return head + "\n".join(lines)


def golden_denoiser(nodes):
    """Of `tests/golden/README.md`, in variance-exploding form, at the nodes of a sampler."""
    return lambda x, i: 1.2 * torch.tanh(1.5 * x / (1 + nodes[i] ** 2) ** 0.5)


def relative_error(value, expected):
    return ((value - expected).abs().max() / expected.abs().max()).item()


def identities():
    """Pairs that must be equal: a step of x = z / alpha, and the same of z, at the first node of four in float32."""
    scheduler = RCFDScheduler()
    t, s = nearest_indices(scheduler.sigma / scheduler.alpha, rho_nodes(4))[:2]
    (alpha, alpha_s), (sigma, sigma_s) = scheduler.alpha[[t, s]].tolist(), scheduler.sigma[[t, s]].tolist()
    nu, nu_s = sigma / alpha, sigma_s / alpha_s
    z, x0 = torch.randn((2, 64, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    x = z / alpha

    def teacher(z, t):
        return 1.3 * torch.tanh(0.7 * z + 0.3 * torch.cos(torch.as_tensor(t).float().view(-1, 1, 1, 1) / 200))

    N, K = 4, 2
    grid = scheduler.grid(N * K)[::-1][: K + 1]
    levels = (scheduler.sigma / scheduler.alpha)[grid].tolist()
    start = z / scheduler.alpha[grid[0]].item()
    end = solve(lambda x, i: teacher(scheduler.alpha[grid[i]].item() * x, grid[i]), start, levels, "euler")[-1]
    D_star = one_step_target(start, end, levels[0], levels[-1])
    distance = euler_step(start, x0, levels[0], levels[-1]) - end
    return {
        "Euler is the DDIM step": (
            alpha_s * euler_step(x, x0, nu, nu_s), alpha_s * x0 + sigma_s * (z - alpha * x0) / sigma),
        "AFS takes z for eps": (
            alpha_s * analytical_first_step(x, nu, nu_s), (alpha_s * alpha / (1 + sigma) + sigma_s) * z),
        "D* is the ladder's target": (D_star, ddim_target(teacher, scheduler, z, torch.full((64,), N), N, K)),
        "x' - T is (1 - nu'/nu)(D - D*)": (distance, (1 - levels[-1] / levels[0]) * (x0 - D_star)),
    }  # fmt: skip
