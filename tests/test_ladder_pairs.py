import pytest
import torch

from diffusers_rcfd import RCFDScheduler
from diffusers_rcfd.distillation.ladder import ddim_target
from diffusers_rcfd.schedulers.scheduling_rcfd import ddim_coefficients
from tests.toys import golden, toy_student, toy_teacher


@pytest.mark.parametrize("N", [512, 4, 2, 1])
def test_golden_two_step_target(N):
    data, scheduler = golden("distillation"), RCFDScheduler()
    t = data[f"N{N}_t"]
    z_t = scheduler.add_noise(data["x0"], data[f"N{N}_noise"], t)
    torch.testing.assert_close(z_t, data[f"N{N}_z_t"], rtol=1e-5, atol=1e-6)
    k = t * N // 1024
    target = ddim_target(toy_teacher, scheduler, z_t, k, student_steps=N)
    exact = ddim_target(toy_teacher, scheduler, z_t.double(), k, student_steps=N)
    torch.testing.assert_close(target.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(eq_12(scheduler, z_t, t, N), data[f"N{N}_x_target"], rtol=1e-5, atol=1e-6)
    # The golden number is Eq. 12 in float32, which at N = 512 subtracts nearly equal images: its own rounding there
    # is 1.3e-4, which the weighted mean does not have.
    torch.testing.assert_close(target, data[f"N{N}_x_target"], rtol=1e-5, atol=2e-4 if N == 512 else 2e-6)
    torch.testing.assert_close(toy_student(z_t, t), data[f"N{N}_x_student"], rtol=1e-5, atol=1e-6)


def eq_12(scheduler, z_t, t, N):
    """Eq. 9 to 12 of the paper, word for word."""
    half = 1024 // (2 * N)
    (alpha, sigma), (alpha1, sigma1), (alpha2, sigma2) = (scheduler.alpha_sigma(t - i * half, z_t) for i in range(3))
    x = toy_teacher(z_t, t)
    z1 = alpha1 * x + sigma1 * ((z_t - alpha * x) / sigma)
    x = toy_teacher(z1, t - half)
    z2 = alpha2 * x + sigma2 * ((z1 - alpha1 * x) / sigma1)
    return (z2 - (sigma2 / sigma) * z_t) / (alpha2 - (sigma2 / sigma) * alpha)


@pytest.mark.parametrize("teacher_steps", [1, 2, 8, 16])
def test_closed_form_one_student_step_lands_where_the_teacher_does(teacher_steps):
    N, scheduler = 4, RCFDScheduler()
    k = torch.tensor([4, 3, 2, 1])
    z_t = torch.randn((4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = ddim_target(toy_teacher, scheduler, z_t, k, N, teacher_steps)

    landed = z_t
    grid = torch.tensor(scheduler.grid(N * teacher_steps))
    for step in range(teacher_steps):  # the teacher by the scheduler's own step, image by image
        scheduler.set_timesteps(N * teacher_steps)
        scheduler.register_to_config(clip_sample=False)
        t = grid[k * teacher_steps - step]
        x0 = toy_teacher(landed, t)
        landed = torch.cat(
            [scheduler.step(x0[i : i + 1], int(t[i]), landed[i : i + 1]).prev_sample for i in range(len(k))]
        )
    start = scheduler.alpha_sigma(grid[k * teacher_steps], z_t)
    a, b = ddim_coefficients(*start, *scheduler.alpha_sigma(grid[(k - 1) * teacher_steps], z_t))
    torch.testing.assert_close(a * target + b * z_t, landed)


def test_closed_form_one_teacher_step_is_the_teacher():
    z_t, k = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([2, 1])
    target = ddim_target(toy_teacher, RCFDScheduler(), z_t, k, student_steps=2, teacher_steps=1)
    torch.testing.assert_close(target, toy_teacher(z_t, torch.tensor([1024, 512])))


def test_target_is_not_clipped_and_takes_no_gradient():
    z_t = torch.full((2, 3, 8, 8), 3.0, requires_grad=True)
    target = ddim_target(toy_teacher, RCFDScheduler(), z_t, torch.tensor([2, 1]), student_steps=2)
    assert target.max() > 1 and not target.requires_grad
