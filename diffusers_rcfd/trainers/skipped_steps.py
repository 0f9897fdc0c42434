"""Steps whose loss or gradient is not finite: they are counted, kept out of the metrics, and end a run if they go on.

The count stays on the device and is looked at when metrics are written; on a CPU, where looking is free, always.
"""

from pathlib import Path

import torch


class SkippedSteps:
    """Counts the steps in a row that were skipped and those that were taken, and remembers the last skipped terms.

    Args:
        limit (`int`): so many in a row end the run.
        scaler (`torch.amp.GradScaler`, *optional*): of fp16, which skips steps while it looks for its scale; they
            count only once that has sunk below 1, which no overflow explains.
        in_a_row (`int`, defaults to 0): steps skipped in a row before, as a checkpoint holds them.
        taken (`int`, defaults to 0): steps of the stage taken before.
    """

    def __init__(self, limit: int, scaler: torch.amp.GradScaler | None = None, in_a_row: int = 0, taken: int = 0):
        self.limit, self.scaler = limit, scaler
        self.in_a_row, self.taken = in_a_row, taken
        self.most = in_a_row
        self.terms = {}

    def add(self, terms: dict[str, torch.Tensor], sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add the loss terms of a step, "grad_norm" among them, to the sums if it was taken; else count it."""
        taken = terms["grad_norm"].isfinite()
        skipped = ~taken
        if self.scaler is not None:
            skipped = skipped & (self.scaler._scale < 1)  # `get_scale` would wait for the device
        self.in_a_row = (self.in_a_row + 1) * skipped
        self.taken = self.taken + taken.long()
        self.most = torch.maximum(self.in_a_row, torch.as_tensor(self.most, device=skipped.device))
        self.terms = {name: torch.where(skipped, term, self.terms.get(name, term)) for name, term in terms.items()}
        added = {name: torch.where(taken, term, 0.0) for name, term in terms.items()}
        added |= {"skipped_steps": skipped.float(), "taken": taken.float()}
        return sums | {name: sums[name] + value if name in sums else value for name, value in added.items()}

    def check(self, where: str, checkpoint: Path | None) -> None:
        """Raise a `FloatingPointError` with what is known, if there were too many in a row."""
        if self.most >= self.limit:
            self._raise(f"{int(self.most)} steps in a row", f" (`max_skipped_steps`={self.limit})", where, checkpoint)

    def check_end(self, where: str, checkpoint: Path | None) -> None:
        """Raise a `FloatingPointError` if no step of a stage that is over was taken: nothing was learned."""
        if self.taken == 0:
            self._raise("All steps", "", where, checkpoint)

    def _raise(self, which: str, limit: str, where: str, checkpoint: Path | None) -> None:
        terms = ", ".join(f"{name}={value.item():g}" for name, value in self.terms.items())
        raise FloatingPointError(
            f"{which} had a loss or gradient that is not finite and were skipped{limit}, up to {where}; the last of "
            f"them: {terms}. Last good checkpoint: {checkpoint or 'none'}. Lower `learning_rate` or `max_grad_norm`, "
            "or look at the data."
        )


def means_of_taken(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums of `SkippedSteps.add` as means over the optimizer steps taken, and the number of "skipped_steps"."""
    means = {name: value / sums["taken"] for name, value in sums.items() if name != "taken"}
    return means | {"skipped_steps": sums["skipped_steps"]}
