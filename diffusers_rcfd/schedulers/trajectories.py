"""Sampling trajectories in variance-exploding form: the state x = z / alpha at the noise level s = sigma / alpha.

Nodes, solvers and targets of Simple and Fast Distillation (SFD; Zhou et al. 2024, arXiv 2409.19681), pure functions.
Notation: D is the denoised image that a network predicts, s the level of a step's start and s' that of its end.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from diffusers_rcfd.schedulers.names import TEACHER_SOLVERS
from diffusers_rcfd.schedulers.scheduling_rcfd import dynamic_threshold

QUANTILE = 0.995  # of an image's |D|, to which it is squeezed where that is above 1


def rho_nodes(
    num_nodes: int, sigma_max: float = 80.0, sigma_min: float = 0.006, rho: float = 7.0, steps: int = 1
) -> torch.Tensor:
    """Noise levels that fall evenly in s^(1/rho) (Karras et al. 2022, Eq. 5), float64.

    Args:
        num_nodes (`int`): N, at least 2.
        sigma_max (`float`, defaults to 80): first level.
        sigma_min (`float`, defaults to 0.006): last level, above 0 and below `sigma_max`.
        rho (`float`, defaults to 7): how much denser the nodes lie at low noise; 1 is even.
        steps (`int`, defaults to 1): sub-intervals K of each of the N - 1 intervals; K (N - 1) + 1 levels in all.

    Raises:
        ValueError: for a value outside those named above.
    """
    if num_nodes < 2:
        raise ValueError(f"`num_nodes` must be at least 2, got {num_nodes!r}.")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"`sigma_min` must be above 0 and below `sigma_max`, got sigma_min={sigma_min}, sigma_max={sigma_max}."
        )
    if not rho > 0:
        raise ValueError(f"`rho` must be above 0, got {rho!r}.")
    return subdivide(torch.tensor([sigma_max, sigma_min], dtype=torch.float64), (num_nodes - 1) * steps, rho)


def subdivide(nodes: torch.Tensor, steps: int, rho: float = 7.0) -> torch.Tensor:
    """Falling noise levels with each interval cut into `steps` parts that are even in s^(1/rho), float64.

    Args:
        nodes (`torch.Tensor`): N falling levels.
        steps (`int`): parts K of each interval, at least 1.
        rho (`float`, defaults to 7): as in `rho_nodes`.

    Raises:
        ValueError: if the levels do not fall, or `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps!r}.")
    nodes = torch.as_tensor(nodes, dtype=torch.float64)
    if len(nodes) < 2 or not (nodes[1:] < nodes[:-1]).all() or not nodes[-1] > 0:
        raise ValueError(f"`nodes` must be two or more noise levels that fall and stay above 0, got {nodes.tolist()}.")
    roots, fraction = nodes ** (1 / rho), torch.arange(steps, dtype=torch.float64) / steps
    inside = roots[:-1, None] + fraction * (roots[1:] - roots[:-1])[:, None]  # (N - 1, K)
    levels = torch.cat([inside.flatten(), roots[-1:]]) ** rho
    levels[::steps] = nodes
    return levels


def nearest_indices(nu: torch.Tensor, levels: torch.Tensor) -> list[int]:
    """The index of the schedule nearest to each noise level, in ln nu.

    Args:
        nu (`torch.Tensor`): sigma / alpha of the whole schedule, (n,).
        levels (`torch.Tensor`): the noise levels sought.

    Raises:
        ValueError: if nu does not rise with the index, so that a level has no index of its own.
    """
    if not (nu[1:] > nu[:-1]).all():
        raise ValueError(
            "The schedule must be invertible: its noise level sigma / alpha must rise with the index, but "
            f"does not after index {int((nu[1:] <= nu[:-1]).nonzero()[0])}."
        )
    return (nu.log()[None] - levels.log()[:, None]).abs().argmin(1).tolist()


# --- steps ----------------------------------------------------------------------------------------------------------


def euler_step(x: torch.Tensor, denoised: torch.Tensor, s: float, s_next: float) -> torch.Tensor:
    """x' = x + (s' - s) (x - D) / s, which is the DDIM step in variance-exploding form."""
    return torch.lerp(denoised, x, s_next / s)


def analytical_first_step(x: torch.Tensor, s: float, s_next: float, data_std: float = 1.0) -> torch.Tensor:
    """Euler step without a network (AFS): at high noise (x - D) / s is all but x / sqrt(data_std^2 + s^2)."""
    return x * (1 + (s_next - s) / math.hypot(data_std, s))


def dpm_solver_step(x: torch.Tensor, denoised: Sequence[torch.Tensor], levels: Sequence[float]) -> torch.Tensor:
    """One multistep DPM-Solver++ step in x0 form (Lu et al. 2022, Algorithm 2, and its third order).

    Args:
        x (`torch.Tensor`): state at s.
        denoised (`Sequence[torch.Tensor]`): D_0 at s, D_1 at the node before it, D_2: as many as the order, 1 to 3.
        levels (`Sequence[float]`): s', s, and the levels of D_1 and D_2.
    """
    lam = [-math.log(s) for s in levels]
    h, *before = (later - earlier for later, earlier in pairwise(lam))
    p1 = math.expm1(-h)
    step = levels[0] / levels[1] * x - p1 * denoised[0]
    if len(denoised) == 1:
        return step
    r0 = before[0] / h
    A = (denoised[0] - denoised[1]) / r0
    if len(denoised) == 2:
        return step - p1 / 2 * A
    r1 = before[1] / h
    B = (denoised[1] - denoised[2]) / r1
    p2 = p1 / h + 1
    p3 = p2 / h - 1 / 2
    E2 = (A - B) / (r0 + r1)
    return step + p2 * (A + r0 * E2) - p3 * E2


# --- whole trajectories ---------------------------------------------------------------------------------------------


def solve(
    denoise: Callable[[torch.Tensor, int], torch.Tensor],
    x: torch.Tensor,
    nodes: Sequence[float],
    solver: str = "dpm-solver++",
    order: int = 3,
    thresholding: bool = True,
    analytical_first: bool = False,
    data_std: float = 1.0,
) -> list[torch.Tensor]:
    """Follow the probability flow through `nodes`; the states at all of them, the first being x itself.

    Diffusers' own `DPMSolverMultistepScheduler` takes the same steps, but lowers the order at the end only below 15
    steps, and so parts from SFD's teacher at 24.

    Args:
        denoise (`Callable`): (x, i) -> D, the denoised image at node i.
        x (`torch.Tensor`): state at the first node, (B, C, H, W).
        nodes (`Sequence[float]`): n falling noise levels.
        solver (`str`, defaults to `"dpm-solver++"`): that, multistep, with n - 1 network evaluations; `"euler"` (DDIM)
            with as many; or `"heun"` (Karras et al. 2022, Algorithm 1) with twice as many.
        order (`int`, defaults to 3): of DPM-Solver++, 1 to 3; the first steps and the last have lower orders.
        thresholding (`bool`, defaults to `True`): `dynamic_threshold` of each D of DPM-Solver++.
        analytical_first (`bool`, defaults to `False`): take the first step analytically, without an evaluation.
        data_std (`float`, defaults to 1.0): that step's, see `RCFDScheduler`.

    Raises:
        ValueError: for nodes that do not fall, and a solver or an order that is none of these.
    """
    if not all(high > low > 0 for high, low in pairwise(nodes)):
        raise ValueError(f"`nodes` must be noise levels that fall and stay above 0, got {list(nodes)}.")
    if solver not in TEACHER_SOLVERS:
        raise ValueError(f"`solver` must be one of {TEACHER_SOLVERS}, got {solver!r}.")
    if order not in (1, 2, 3):
        raise ValueError(f"`order` must be 1, 2 or 3, got {order!r}.")
    states, buffer = [x], []  # of denoised images, newest first
    for i, (s, s_next) in enumerate(pairwise(nodes)):
        if i == 0 and analytical_first:
            x = analytical_first_step(x, s, s_next, data_std)
        elif solver == "dpm-solver++":
            D = denoise(x, i)
            buffer = [dynamic_threshold(D, QUANTILE, math.inf) if thresholding else D, *buffer[: order - 1]]
            # The analytical step, if any, has left nothing in the buffer.
            now = min(len(buffer), order if i + 1 < order else min(order, len(nodes) - i - 1))
            x = dpm_solver_step(x, buffer[:now], nodes[max(i + 1 - now, 0) : i + 2][::-1])
        else:
            D = denoise(x, i)
            ahead = euler_step(x, D, s, s_next)
            if solver == "heun":
                slope = ((x - D) / s + (ahead - denoise(ahead, i + 1)) / s_next) / 2
                ahead = x + (s_next - s) * slope
            x = ahead
        states.append(x)
    return states


def network_calls(nodes: Sequence, solver: str) -> int:
    """Network evaluations that `solve` takes down `nodes` without an analytical first step."""
    return (len(nodes) - 1) * (2 if solver == "heun" else 1)


def one_step_target(x: torch.Tensor, x_next: torch.Tensor, s: float, s_next: float) -> torch.Tensor:
    """D*, the denoised image whose Euler step leads from x at s to `x_next` at s'.

    |x' - T| of two states is (1 - s'/s) |D - D*| of their denoised images, so a loss may compare either. Between
    nodes of a teacher that started at x itself, D* is `targets.ddim_target`.
    """
    ratio = s_next / s
    return (x_next - ratio * x) / (1 - ratio)
