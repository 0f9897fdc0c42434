"""One student of a ladder. Free of torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rung:
    """One student of the ladder: N = `student_steps`, each matching K = `teacher_steps` steps of its teacher."""

    student_steps: int
    teacher_steps: int
    objective: str
    temperature: float
    regularization_weight: float
    entropy_ratio: float
    max_train_steps: int

    @property
    def name(self) -> str:
        """Name of the student's folder: "4-step"."""
        return f"{self.student_steps}-step"
