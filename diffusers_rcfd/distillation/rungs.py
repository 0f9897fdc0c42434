"""One student of a ladder. Free of torch."""

from dataclasses import dataclass

from diffusers_rcfd.distillation.objectives import needs_classifier


@dataclass(frozen=True)
class Rung:
    """One student of the ladder: N = `student_steps`, each matching K = `teacher_steps` steps of its teacher.

    Args:
        student_steps (`int`): N.
        teacher_steps (`int`): K.
        objective (`str`): name of the objective, or its terms as they were given.
        temperature (`float`): tau.
        regularization_weight (`float`): beta; 0 where the objective has none.
        entropy_ratio (`float`): gamma.
        max_train_steps (`int`): optimizer steps.
        terms (`tuple[tuple[str, float], ...]`): the objective's terms and their weights.
    """

    student_steps: int
    teacher_steps: int
    objective: str
    temperature: float
    regularization_weight: float
    entropy_ratio: float
    max_train_steps: int
    terms: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """Name of the student's folder: "4-step"."""
        return f"{self.student_steps}-step"

    @property
    def guided(self) -> bool:
        """Whether a classifier guides this rung."""
        return needs_classifier(dict(self.terms))
