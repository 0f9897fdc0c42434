"""Two ways of doing the same thing, timed side by side: what the benchmarks of speed share."""

import resource
import statistics
import time

import torch

from diffusers_rcfd import FeatureClassifier, RCFDPipeline, RCFDScheduler, build_unet, load_image_data

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRESETS = ("digits", "fashion-mnist", "cifar10")


class Clock:
    """Time as passed; or, on a CPU that others keep busy, as this process and its children used of it."""

    cpu_time = False

    def __call__(self):
        if not self.cpu_time:
            return time.perf_counter()
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in used)


clock = Clock()


def seconds(function, repeats):
    """Time of one call, the mean over `repeats`."""
    start = clock()
    for _ in range(repeats):
        function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / repeats


def ratio(numerator, denominator, pairs, least_seconds=0.05):
    """Quartiles of the ratio of two functions' times, in alternating pairs, each long enough to be timed."""
    repeats = [max(1, round(least_seconds / max(seconds(f, 2), 1e-6))) for f in (numerator, denominator)]
    ratios = []
    for number in range(pairs):
        times = {}
        for which in (0, 1) if number % 2 else (1, 0):
            times[which] = seconds((numerator, denominator)[which], repeats[which])
        ratios.append(times[0] / times[1])
    return statistics.quantiles(ratios, n=4)


def row(figure, setting, quartiles, goal):
    return {"figure": figure, "setting": setting, "quartiles": quartiles, "goal": goal}


def line(row):
    low, median, high = row["quartiles"]
    met = (
        "" if row["goal"] is None else ("yes" if median <= row["goal"] else f"no, {median / row['goal'] - 1:.0%} over")
    )
    goal = "" if row["goal"] is None else f"{row['goal']:.2f}"
    return f"| {row['figure']} | {row['setting']} | {median:.3f} | {low:.3f} to {high:.3f} | {goal} | {met} |"


def pipeline_of(preset, **overrides):
    """A pipeline of a preset with random weights."""
    pipeline = RCFDPipeline(build_unet(preset, **overrides).eval(), RCFDScheduler()).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def batch_sizes(preset):
    return (1, 2) if preset == "cifar10" and DEVICE.type == "cpu" else (1, 64)


def components(preset, network=None):
    """Teacher, classifier and images as large as a preset's; `network` replaces options of its U-Net."""
    pipeline = pipeline_of(preset, **(network or {}))
    channels, size, _ = pipeline.image_shape
    images = load_image_data("digits", resolution=None if size == 8 else size, channels=channels)
    small = preset == "digits"
    backbone = "test_resnet" if small else "resnet18"
    classifier = FeatureClassifier(backbone, num_classes=10, in_channels=channels, small_stem=small)
    return pipeline, classifier.to(DEVICE).freeze(), images
