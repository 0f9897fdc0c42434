"""What a training step costs in one checkout of the package over another, side by side in one process.

python benchmarks/checkouts.py OLD_CHECKOUT    # against the checkout that this file is in

Runs of a few steps through the public interface alternate between the two; a step's cost is the processor time
between two optimizer steps, the median over a run.
"""

import contextlib
import importlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

NEW = Path(__file__).resolve().parent.parent
STEPS, PAIRS = 24, 15


@contextlib.contextmanager
def package_of(checkout, kept={}):  # noqa: B006 - the modules of each checkout, imported once
    """The package of a checkout, as `diffusers_rcfd` in `sys.modules` while this lasts."""
    sys.path.insert(0, str(checkout))
    sys.modules.update(kept.get(checkout, {}))
    try:
        yield importlib.import_module("diffusers_rcfd")
    finally:
        names = [name for name in sys.modules if name.partition(".")[0] == "diffusers_rcfd"]
        kept[checkout] = {name: sys.modules.pop(name) for name in names}
        sys.path.remove(str(checkout))


def train(checkout, method):
    """Seconds of processor time that an optimizer step takes, the median over a short run."""
    moments, step = [], torch.optim.Adam.step

    def timed(*args, **options):
        moments.append(time.process_time())
        return step(*args, **options)

    with package_of(checkout) as rcfd, tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        options = {"train_batch_size": 64, "learning_rate": 1e-4, "checkpointing_steps": 0, "logging_steps": STEPS}
        teacher = rcfd.RCFDPipeline(rcfd.build_unet("digits"), rcfd.RCFDScheduler())
        if method == "rcfd":
            classifier = rcfd.FeatureClassifier("test_resnet", num_classes=10, in_channels=1, small_stem=True).freeze()
            config = rcfd.CFDDistillationConfig(folder, student_steps=[4], max_train_steps=[STEPS], **options)
            trainer = rcfd.CFDDistillationTrainer(teacher, classifier, config, rcfd.load_image_data("digits"))
        else:
            config = rcfd.SFDDistillationConfig(folder, student_steps=[3], max_train_steps=STEPS // 3, **options)
            trainer = rcfd.SFDDistillationTrainer(teacher, None, config)
        torch.optim.Adam.step = timed
        try:
            trainer.train()
        finally:
            torch.optim.Adam.step = step
            AcceleratorState._reset_state(True)
    return statistics.median(later - earlier for earlier, later in zip(moments[4:], moments[5:], strict=False))


def main(old):
    torch.set_num_threads(1)
    for method in ("rcfd", "sfd"):
        ratios = []
        for number in range(PAIRS + 1):
            order = (NEW, old) if number % 2 else (old, NEW)
            times = {checkout: train(checkout, method) for checkout in order}
            ratios.append(times[NEW] / times[old])
        low, median, high = statistics.quantiles(ratios[1:], n=4)  # the first pair warms up
        print(f"{method}: a step of this checkout over one of the other, {PAIRS} pairs of {STEPS} steps: "
              f"{median:.3f} ({low:.3f} to {high:.3f})")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
