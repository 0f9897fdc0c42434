"""The options of a ladder of students, checked where they enter. Free of torch, as `configs`."""

from dataclasses import dataclass
from typing import Any

from diffusers_rcfd.distillation.objectives import OBJECTIVES, Weights, parse_terms
from diffusers_rcfd.distillation.rungs import Rung
from diffusers_rcfd.trainers.config import LR_SCHEDULERS, DistillationConfig
from diffusers_rcfd.validation import document_options, is_count, is_number, normalize, option, require

# The options that take one value for each rung of a ladder.
PER_RUNG = ("teacher_steps", "objective", "temperature", "regularization_weight", "entropy_ratio", "max_train_steps")

# Appendix C.4 of the paper: student steps -> (tau, beta, gamma).
LOSS_PRESETS = {
    "resnet18": {4: (0.95, 0.003, 0.75), 2: (0.95, 0.003, 0.75), 1: (0.85, 0.003, 0.5)},
    "densenet201": {4: (0.9, 0.0, 0.5), 2: (1.0, 0.0, 0.5), 1: (0.85, 0.0, 0.5)},
}


@document_options
@dataclass
class CFDDistillationConfig(DistillationConfig):
    """A ladder of students, each the next one's teacher, with the paper's appendix C.4 as defaults.

    Options said to be for each rung take one value for all, or as many as `student_steps` has.
    """

    student_steps: list[int] = option([4, 2, 1], "Steps of the students, falling, each dividing the one before.")
    teacher_steps: list[int] | None = option(
        None,
        "Teacher steps K that a student matches with each of its own, for each rung. Unset: 2 from a base model, else "
        "the ratio of the two step counts. A base model takes any K, so that rungs can be skipped.",
    )
    objective: list[str] = option(
        ["rcfd"],
        "For each rung: 'pd' matches images (Eq. 2), 'l1' too, by their mean absolute error; 'cfd' the classifier's "
        "feature distribution (Eq. 4), 'rcfd' adds entropy and diversity (Eq. 7).",
    )
    source: str = option("ladder", "Where the pairs of student and target come from: one of `SOURCES`.")
    preset: str | None = option(
        "resnet18",
        f"Paper's temperature, weight and ratio for a classifier: one of {tuple(LOSS_PRESETS)} or none. It names "
        "4, 2 and 1 steps; earlier rungs take those of 4. Values given below win.",
    )
    temperature: list[float] | None = option(None, "tau in (0, 1], for each rung: sharpens the teacher's features.")
    regularization_weight: list[float] | None = option(
        None,
        "beta, for each rung: weight of entropy and diversity (rcfd). The diversity term's mean runs over the whole "
        "batch of an optimizer step, of all processes and accumulated batches, which those cost a forward pass more.",
    )
    entropy_ratio: list[float] | None = option(None, "gamma in [0, 1], for each rung: entropy's share of that weight.")
    max_train_steps: list[int] | None = option(
        None, "Optimizer steps, for each rung. Unset: the paper's 10 000 down to 4 student steps, 20 000 below."
    )
    learning_rate: float = option(5e-5, "Peak learning rate, of each rung anew.")
    lr_scheduler: str = option("cosine", f"Learning-rate schedule of Diffusers: one of {LR_SCHEDULERS}.")

    def __post_init__(self):
        normalize(self)
        super_check = self.max_train_steps
        self.max_train_steps = self.max_train_steps or [1]
        super().__post_init__()
        self.max_train_steps = super_check

        steps = self.student_steps
        require(
            len(steps) > 0 and all(is_count(N, 1) for N in steps),
            "student_steps",
            steps,
            "positive integers, one or more",
        )
        require(
            all(high > low and high % low == 0 for high, low in zip(steps, steps[1:], strict=False)),
            "student_steps",
            steps,
            "in falling order, each dividing the one before it",
        )
        for name in PER_RUNG:
            value = getattr(self, name)
            if value is not None:
                require(
                    len(value) in (1, len(steps)), name, value, f"one value, or one for each of the {len(steps)} rungs"
                )
        for K in self.teacher_steps or ():
            require(is_count(K, 1), "teacher_steps", K, "positive integers")
        for objective in self.objective:
            require(objective in OBJECTIVES, "objective", objective, f"one of {tuple(OBJECTIVES)}")
        if self.preset in ("none", ""):
            self.preset = None
        presets = tuple(LOSS_PRESETS)
        require(self.preset is None or self.preset in LOSS_PRESETS, "preset", self.preset, f"one of {presets} or none")
        for tau in self.temperature or ():
            self.check_temperature(tau)
        for beta in self.regularization_weight or ():
            require(is_number(beta) and beta >= 0, "regularization_weight", beta, "a number of at least 0")
        for gamma in self.entropy_ratio or ():
            require(is_number(gamma) and 0 <= gamma <= 1, "entropy_ratio", gamma, "in [0, 1]")

    def rungs(self, teacher_num_inference_steps: int | None, last_index: int) -> list[Rung]:
        """The ladder below a teacher.

        Args:
            teacher_num_inference_steps (`int`, *optional*): steps the teacher was distilled for; `None` for a base
                model, which samples in any number of steps.
            last_index (`int`): T, the largest step count of the schedule.

        Raises:
            ValueError: if the steps do not divide the teacher's, exceed them, or `teacher_steps` does not lead there.
        """
        above, rungs = teacher_num_inference_steps, []
        for i, N in enumerate(self.student_steps):
            K = self._of_rung("teacher_steps", i)
            if above is None:
                K = K or 2
                allowed = f"such that `student_steps` times `teacher_steps` is at most T = {last_index}"
                require(N * K <= last_index, "student_steps", f"{N} (with {K} teacher steps)", allowed)
            else:
                require(N < above or K == 1, "student_steps", N, f"below the teacher's {above} steps")
                require(above % N == 0, "student_steps", N, f"a divisor of the teacher's {above} steps")
                K = K or above // N
                require(N * K == above, "teacher_steps", K, f"{above // N}, for {above} steps to become {N}")
            presets = LOSS_PRESETS.get(self.preset, {})
            tau, beta, gamma = presets.get(min(N, 4), presets.get(2)) if presets else (1.0, 0.0, 0.5)
            given = (self._of_rung(name, i) for name in ("temperature", "regularization_weight", "entropy_ratio"))
            tau, beta, gamma = (
                default if value is None else value for value, default in zip(given, (tau, beta, gamma), strict=True)
            )
            iterations = self._of_rung("max_train_steps", i) or (10_000 if N >= 4 else 20_000)
            if self.terms is None:
                objective = self._of_rung("objective", i)
                weights = OBJECTIVES[objective](Weights(self.distribution, self.cfd_weight, beta, gamma))
            else:
                objective, weights = " ".join(self.terms), parse_terms(self.terms)
            beta = beta if "diversity" in weights else 0.0
            rungs.append(Rung(N, K, objective, tau, beta, gamma, iterations, tuple(weights.items())))
            above = N
        return rungs

    def _of_rung(self, name: str, i: int) -> Any:
        """The value of an option at rung i."""
        value = getattr(self, name)
        return None if value is None else value[i if len(value) > 1 else 0]
