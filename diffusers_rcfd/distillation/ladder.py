"""The pairs of a ladder of students (progressive distillation, CFD, RCFD): Eq. 9 to 12 of the paper."""

from collections.abc import Callable, Iterator

import torch

from diffusers_rcfd.data.image_tensors import flip
from diffusers_rcfd.distillation.pairs import Pair
from diffusers_rcfd.distillation.rungs import Rung
from diffusers_rcfd.models.denoiser import Denoiser
from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler


@torch.no_grad()
def ddim_target(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: RCFDScheduler,
    z_t: torch.Tensor,
    k: torch.Tensor,
    student_steps: int,
    teacher_steps: int = 2,
) -> torch.Tensor:
    """The x0 that takes an N-step student in one DDIM step where its teacher gets in K (appendix B, Eq. 9 to 12).

    A DDIM step is z' = a x + b z with b = sigma'/sigma and a = alpha' - b alpha. For two of them (Eq. 9 to 11):

        z''  = a2 x2 + b2 (a1 x1 + b1 z)            = (a2 x2 + b2 a1 x1) + b1 b2 z
        z''  = A x0_target + B z                      the student's one step, with B = sigma''/sigma = b1 b2
        A    = alpha'' - B alpha                    = a2 + b2 a1
        Eq. 12: x0_target = (z'' - B z) / A         = (a2 x2 + b2 a1 x1) / (a2 + b2 a1)

    so z cancels, and what is left is a weighted mean of the teacher's predictions on the way, for any K. Eq. 12 taken
    literally subtracts nearly equal images. (The paper's Eq. 10 misprints z_t for z_t': the second step starts at
    z_t'.)

    Args:
        denoise (`Callable`): the teacher as (z_t, t) -> unclipped x0, with z_t (B, C, H, W) and t (B,).
        scheduler (`RCFDScheduler`): the schedule and grid that teacher and student share.
        z_t (`torch.Tensor`): noisy images (B, C, H, W).
        k (`torch.Tensor`): step of the student's grid that each image stands at, integers 1..N, (B,).
        student_steps (`int`): N.
        teacher_steps (`int`, defaults to 2): K, teacher steps for each student step; 2 is the paper's.

    Returns:
        `torch.Tensor`: x0_target (B, C, H, W), float32 or wider.
    """
    t, steps = scheduler.step_table(student_steps * teacher_steps, like=z_t)
    z, x0_sum, weight_sum = z_t, 0, 0
    for position in range(teacher_steps):
        p = k * teacher_steps - position
        a, b = steps[p].view(-1, 2, 1, 1, 1).unbind(1)  # each (B, 1, 1, 1)
        x0 = denoise(z, t[p])
        z = a * x0 + b * z
        x0_sum = a * x0 + b * x0_sum
        weight_sum = a + b * weight_sum
    return x0_sum / weight_sum


def ladder_pairs(student: Denoiser, teacher: Denoiser, rung: Rung, batch: dict[str, torch.Tensor]) -> Iterator[Pair]:
    """The student's x0 at noised images, and the x0 that takes it where its teacher gets in K steps.

    Args:
        student, teacher (`Denoiser`): on the same schedule.
        rung (`Rung`): gives N and K.
        batch (`dict`): "images" in [-1, 1] and "noise", both (B, C, H, W); "k" (B,) in 1..N; "flip" (B,); "labels"
            (B,) for a class-conditional teacher.
    """
    scheduler, labels = student.scheduler, batch.get("labels")
    x0 = flip(batch["images"], batch["flip"])
    t = scheduler.step_table(rung.student_steps, like=x0)[0][batch["k"]]
    z_t = scheduler.add_noise(x0, batch["noise"], t)

    def denoise(z, t):
        return teacher(z, t, labels)

    # First the target: the teacher needs no memory any more when that of the student's activations is taken.
    x0_target = ddim_target(denoise, scheduler, z_t, batch["k"], rung.student_steps, rung.teacher_steps)
    yield Pair(lambda: student(z_t, t, labels), x0_target, *scheduler.alpha_sigma(t, z_t))
