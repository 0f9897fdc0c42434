"""What a sampler predicts on its way to an image, seen by a classifier (Figure 2 of the paper)."""

from dataclasses import dataclass
from pathlib import Path

import torch

from diffusers_rcfd.evaluation.sampling import initial_noise
from diffusers_rcfd.losses.predictions import entropy
from diffusers_rcfd.models.feature_classifier import FeatureClassifier
from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline


@dataclass
class Inspection:
    """The way of a set of images through N steps.

    Args:
        timesteps (`list[int]`): indices of the schedule that the network was called at, falling, N of them.
        x0 (`torch.Tensor`): predicted images in [-1, 1], (N, B, C, H, W).
        entropy (`torch.Tensor`): of the classifier's prediction of each, in nats, (N, B).
        histogram (`torch.Tensor`): share of each class among the final images, (num_classes,).
    """

    timesteps: list[int]
    x0: torch.Tensor
    entropy: torch.Tensor
    histogram: torch.Tensor

    def numbers(self) -> dict:
        """Mean entropy by step and the class histogram, in types that JSON has."""
        return {
            "timesteps": self.timesteps,
            "entropy": self.entropy.mean(1).tolist(),
            "histogram": self.histogram.tolist(),
        }


@torch.no_grad()
def inspect_sampling(
    pipeline: RCFDPipeline,
    classifier: FeatureClassifier,
    num_inference_steps: int | None = None,
    num_images: int = 500,
    seed: int = 0,
) -> Inspection:
    """Sample images from `initial_noise` and look at the predicted x0 of each step.

    Args:
        pipeline (`RCFDPipeline`): base model or student; a class-conditional one is given its classes in turn.
        classifier (`FeatureClassifier`): called with images in [-1, 1].
        num_inference_steps (`int`, *optional*): steps; by default what the model was distilled for.
        num_images (`int`, defaults to 500): images, in one batch.
        seed (`int`, defaults to 0): of the noise.

    Raises:
        ValueError: for steps that the model does not take.
    """
    scheduler, denoiser, device = pipeline.scheduler, pipeline.denoiser, pipeline.unet.device
    scheduler.set_timesteps(num_inference_steps, device=device)
    labels = torch.arange(num_images, device=device) % (denoiser.num_classes or 1)
    z = scheduler.init_noise_sigma * initial_noise(range(num_images), denoiser.image_shape, seed).to(device)
    predictions, entropies = [], []
    for t in scheduler.timesteps:
        z, x0 = scheduler.step(denoiser.predict(z, t, labels), t, z, return_dict=False)
        logits = classifier.eval()(x0.clamp(-1, 1)).logits.float()
        predictions.append(x0.cpu())
        entropies.append(entropy(logits).cpu())
    histogram = torch.bincount(logits.argmax(1).cpu(), minlength=logits.shape[1]) / num_images
    return Inspection(scheduler.timesteps.tolist(), torch.stack(predictions), torch.stack(entropies), histogram)


def draw_inspection(inspections: dict[str, Inspection], path: Path, num_rows: int = 6) -> None:
    """Draw a PNG: predicted x0 by model (left) and step, then the entropy curves and the class histograms.

    Args:
        inspections (`dict[str, Inspection]`): by the name of the model.
        path (`Path`): of the PNG.
        num_rows (`int`, defaults to 6): noises drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widths = [len(inspection.timesteps) for inspection in inspections.values()]
    figure = pyplot.figure(figsize=(max(0.8 * sum(widths) + 0.4 * len(widths), 7), 0.8 * num_rows + 4.5))
    above, below = figure.subfigures(2, 1, height_ratios=[0.8 * num_rows + 1.2, 3.3])
    panels = above.subfigures(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for panel, (name, inspection) in zip(panels, inspections.items(), strict=True):
        panel.suptitle(name, fontsize=10)
        axes = panel.subplots(num_rows, len(inspection.timesteps), squeeze=False)
        for column, (t, x0) in enumerate(zip(inspection.timesteps, inspection.x0, strict=True)):
            axes[0, column].set_title(f"t={t}", fontsize=7)
            for axis, image in zip(axes[:, column], x0, strict=False):
                pixels = (image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).squeeze(-1)
                axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axis.set_axis_off()
    curves, bars = below.subplots(1, 2)
    for number, (name, inspection) in enumerate(inspections.items()):
        curves.plot(inspection.timesteps, inspection.entropy.mean(1), marker="o", label=name)
        classes = torch.arange(len(inspection.histogram)) + (number + 0.5) / len(inspections) * 0.8 - 0.4
        bars.bar(classes, inspection.histogram, width=0.8 / len(inspections), label=name)
    curves.invert_xaxis()
    curves.set(xlabel="t", ylabel="entropy of the prediction (nats)")
    curves.legend(fontsize=8)
    bars.set(xlabel="class", ylabel="share of the final images")
    figure.savefig(path, dpi=90, bbox_inches="tight")
    pyplot.close(figure)
