"""Steps whose loss or gradient is not finite: counted, kept out of the metrics, and the end of a run if they go on.

The count stays on the device and is looked at when metrics are written; on a CPU, where looking is free, always.
"""

from pathlib import Path

import torch


class SkippedSteps:
    """Counts the steps in a row that were left out, and remembers the terms of the last one.

    Args:
        limit (`int`): so many in a row end the run.
        scaler (`torch.amp.GradScaler`, *optional*): of fp16, which leaves out steps while it looks for its scale;
            they count only once that has sunk below 1, which no overflow explains.
    """

    def __init__(self, limit: int, scaler: torch.amp.GradScaler | None = None):
        self.limit, self.scaler, self.in_a_row, self.most, self.terms = limit, scaler, 0, 0, {}

    def add(self, terms: dict[str, torch.Tensor], sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The sums of the loss terms with those of a step, "grad_norm" among them, if it was taken; else counted."""
        taken = terms["grad_norm"].isfinite()
        skipped = ~taken
        if self.scaler is not None:
            skipped = skipped & (self.scaler._scale < 1)  # `get_scale` would wait for the device
        self.in_a_row = (self.in_a_row + 1) * skipped
        self.most = torch.maximum(self.in_a_row, torch.as_tensor(self.most, device=skipped.device))
        self.terms = {name: torch.where(skipped, term, self.terms.get(name, term)) for name, term in terms.items()}
        added = {name: torch.where(taken, term, 0.0) for name, term in terms.items()}
        added |= {"skipped_steps": skipped.float(), "taken": taken.float()}
        return sums | {name: sums[name] + value if name in sums else value for name, value in added.items()}

    def check(self, where: str, checkpoint: Path | None) -> None:
        """Raise a `FloatingPointError` with what is known, if there were too many in a row."""
        if self.most >= self.limit:
            terms = ", ".join(f"{name}={value.item():g}" for name, value in self.terms.items())
            raise FloatingPointError(
                f"{int(self.most)} steps in a row had a loss or gradient that is not finite and were skipped "
                f"(`max_skipped_steps`={self.limit}), up to {where}; the last of them: {terms}. Last good checkpoint: "
                f"{checkpoint or 'none'}. Lower `learning_rate` or `max_grad_norm`, or look at the data."
            )


def means_of_taken(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums of `SkippedSteps.add` as means over the optimizer steps taken, and the number of "skipped_steps"."""
    means = {name: value / sums["taken"] for name, value in sums.items() if name != "taken"}
    return means | {"skipped_steps": sums["skipped_steps"]}
