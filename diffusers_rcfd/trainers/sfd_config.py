"""The options of SFD, checked where they enter. Free of torch, as `configs`."""

from dataclasses import dataclass

from diffusers_rcfd.distillation.objectives import OBJECTIVES, Weights, parse_terms
from diffusers_rcfd.schedulers.names import TEACHER_SOLVERS
from diffusers_rcfd.trainers.config import LR_SCHEDULERS, DistillationConfig
from diffusers_rcfd.validation import document_options, is_count, is_number, option, require


@document_options
@dataclass
class SFDDistillationConfig(DistillationConfig):
    """Simple and Fast Distillation, with the paper's CIFAR-10 settings as defaults (Zhou et al. 2024)."""

    student_steps: list[int] = option(
        [2], "Network evaluations of the student; several make one model that samples in each of them (SFD-v)."
    )
    teacher_steps: list[int] = option(
        [4],
        "Teacher steps K for each step of the student: one number, or one for each of `student_steps`, such as 8 4 2 "
        "for 1 2 4, which then all learn the end of a trajectory of 8.",
    )
    teacher_solver: str = option(
        "dpm-solver++", f"One of {TEACHER_SOLVERS}; euler is DDIM, heun takes two evaluations a step."
    )
    solver_order: int = option(3, "Order of dpm-solver++, 1 to 3; lower in the first steps and the last.")
    dynamic_thresholding: bool = option(True, "dpm-solver++: squeeze each denoised image by its 0.995 quantile.")
    analytical_first_step: bool = option(
        True, "The student's first step is taken without the network (AFS): one node more for as many evaluations."
    )
    sigma_max: float = option(80.0, "Noise level sigma / alpha of the first node.")
    sigma_min: float = option(0.006, "Noise level of the last node, above 0 and below `sigma_max`.")
    rho: float = option(7.0, "How much denser the nodes lie at low noise; they are even in sigma^(1/rho).")
    nodes: list[float] | None = option(
        None, "The student's noise levels themselves, falling, in place of sigma_max, sigma_min and student_steps."
    )
    objective: str = option(
        "l1",
        "'l1' between the states at the next node (SFD), a mean over pixels; 'cfd' (Eq. 4), 'rcfd' (Eq. 7) or 'pd' "
        "(Eq. 2) between the denoised images of student and teacher that lead there.",
    )
    l1_weight: float = option(0.0, "cfd, rcfd, pd: weight of the l1 added to them.")
    temperature: float = option(1.0, "cfd, rcfd: tau in (0, 1], sharpens the teacher's features.")
    regularization_weight: float = option(0.003, "rcfd: beta, weight of entropy and diversity.")
    entropy_ratio: float = option(0.75, "rcfd: gamma in [0, 1], entropy's share of that weight.")
    perceptual_weight: float = option(
        1.0,
        "l1, second stage (the teacher is a student of SFD): weight at the last node of LPIPS where it is given, else "
        "of the classifier's spatial features; 0 for none.",
    )
    max_train_steps: int = option(
        1563, "Batches of trajectories, each with an optimizer step at every evaluated node; the paper's 200 000."
    )
    learning_rate: float = option(5e-5, "Peak learning rate.")
    lr_scheduler: str = option(
        "piecewise_constant",
        f"Learning-rate schedule of Diffusers: one of {LR_SCHEDULERS}; piecewise_constant is a tenth from half-way.",
    )
    max_grad_norm: float = option(0.0, "Gradients are clipped to this norm; 0 does not clip.")

    def __post_init__(self):
        super().__post_init__()
        steps = self.student_steps
        counts = len(steps) > 0 and all(is_count(N, 1) for N in steps)
        different = counts and len(set(steps)) == len(steps)
        require(different, "student_steps", steps, "positive integers, one or more, all different")
        K = self.teacher_steps
        listed = len(K) in (1, len(steps)) and all(is_count(number, 1) for number in K)
        require(listed, "teacher_steps", K, f"one positive integer, or one for each of the {len(steps)} step counts")
        require(
            self.teacher_solver in TEACHER_SOLVERS, "teacher_solver", self.teacher_solver, f"one of {TEACHER_SOLVERS}"
        )
        order = self.solver_order
        require(is_count(order, 1) and order <= 3, "solver_order", order, "1, 2 or 3")
        require(self.objective in OBJECTIVES, "objective", self.objective, f"one of {tuple(OBJECTIVES)}")
        for name in ("sigma_max", "sigma_min", "rho"):
            value = getattr(self, name)
            require(is_number(value) and value > 0, name, value, "a number above 0")
        require(self.sigma_min < self.sigma_max, "sigma_min", self.sigma_min, f"below sigma_max={self.sigma_max}")
        for name in ("l1_weight", "regularization_weight", "perceptual_weight"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, name, value, "a number of at least 0")
        number = self.max_train_steps
        require(is_count(number, 1), "max_train_steps", number, "a positive integer: a student of SFD is one stage")
        require(not self.random_flip, "random_flip", self.random_flip, "False: SFD takes no images")
        workers, warmup = self.dataloader_num_workers, self.lr_warmup_steps
        require(workers == 0, "dataloader_num_workers", workers, "0: SFD takes no images")
        warms = self.lr_scheduler != "piecewise_constant"
        require(warms or warmup == 0, "lr_warmup_steps", warmup, "0 with lr_scheduler 'piecewise_constant'")
        gamma = self.entropy_ratio
        require(is_number(gamma) and 0 <= gamma <= 1, "entropy_ratio", gamma, "in [0, 1]")
        self.check_temperature(self.temperature)
        if self.objective == "l1":
            require(self.l1_weight == 0, "l1_weight", self.l1_weight, "0 for objective 'l1', which is nothing else")
        left = any(self.weights(second_stage=False, lpips=False).values())
        require(left, "cfd_weight", self.cfd_weight, "above 0 where no other loss is left")
        if self.nodes is not None:
            self._take_nodes()

    def _take_nodes(self) -> None:
        """Check `nodes` and set the step count that follows from them."""
        nodes, least = self.nodes, 2 + self.analytical_first_step
        listed = isinstance(nodes, (list, tuple)) and all(is_number(level) for level in nodes)
        falling = listed and all(high > low for high, low in zip(nodes, nodes[1:], strict=False))
        enough = falling and len(nodes) >= least and nodes[-1] > 0
        require(enough, "nodes", nodes, f"{least} or more falling levels above 0")
        require(len(self.student_steps) == 1, "student_steps", self.student_steps, "one number with `nodes`")
        self.student_steps = [len(nodes) - least + 1]

    def num_nodes(self, student_steps: int) -> int:
        """Nodes N of a student of so many evaluations: one more, and another one for the analytical first step."""
        return student_steps + 1 + self.analytical_first_step

    def teacher_steps_of(self, student_steps: int) -> int:
        """Teacher steps K for each step of a student of so many evaluations."""
        return self.teacher_steps[self.student_steps.index(student_steps) if len(self.teacher_steps) > 1 else 0]

    def weights(self, second_stage: bool, lpips: bool) -> dict[str, float]:
        """The terms of the loss and their weights.

        Args:
            second_stage (`bool`): the teacher is a student of SFD, which adds a perceptual term to l1.
            lpips (`bool`): whether LPIPS is at hand for it; else the classifier's spatial features are.
        """
        if self.terms is not None:
            return parse_terms(self.terms)
        options = Weights(self.distribution, self.cfd_weight, self.regularization_weight, self.entropy_ratio)
        weights = OBJECTIVES[self.objective](options)
        if "l1" not in weights:
            return weights | {"l1": self.l1_weight}
        return weights | ({"lpips" if lpips else "perceptual": self.perceptual_weight} if second_stage else {})
