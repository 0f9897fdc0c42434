"""A panel of judges: several evaluators that measure the same images, each with its role beside its name."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffusers_rcfd.evaluation.config import EvaluationConfig
from diffusers_rcfd.evaluation.evaluator import (
    ROLES,
    EvaluationResult,
    Evaluator,
    evaluate_images,
    load_evaluator,
)
from diffusers_rcfd.evaluation.lite0 import LITE0, has_lite0, load_lite0
from diffusers_rcfd.evaluation.pixels import PixelExtractor
from diffusers_rcfd.validation import require

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffusers_rcfd.data.image_data import ImageData
    from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline


@dataclass(frozen=True)
class PanelResult:
    """What the judges of a `Panel` found about the same images; the main judge's numbers stand for all.

    Args:
        results (`tuple[EvaluationResult, ...]`): of each judge, the main one first.
    """

    results: tuple[EvaluationResult, ...]

    @property
    def main(self) -> EvaluationResult:
        """The result of the main judge."""
        return self.results[0]

    def __getitem__(self, metric: str) -> float:
        return self.main[metric]

    def score(self, metric: str) -> float:
        """The main judge's metric with the sign that makes higher better."""
        return self.main.score(metric)

    @property
    def named_values(self) -> dict[str, float]:
        """The numbers of all judges, by the names they are reported under."""
        return {name: value for result in self.results for name, value in result.named_values.items()}

    def __str__(self) -> str:
        return "\n".join(str(result) for result in self.results)

    def to_dict(self) -> dict:
        """The main judge's result in types that JSON has, with those of all judges under "judges"."""
        return self.main.to_dict() | {"judges": [result.to_dict() for result in self.results]}


class Panel:
    """Several judges of the same generated images, which are drawn once; it is used in place of an `Evaluator`.

    The main judge is the foreign one, else the twin, else the pixels. Its metrics, batch size and seed are those of
    the panel.

    Args:
        judges (`Sequence[Evaluator]`): each with a `role`, one at least that no loss has seen; of one reference, and
            with different names or roles.

    Raises:
        ValueError: for no judge that may judge, a judge without a role, two with one name and role, or judges with
            different references.

    Example:
        ```python
        twin = Evaluator(classifier, images, name="resnet10-digits", role="twin")
        pixels = Evaluator(PixelExtractor(images.image_shape), images, metrics="fd", role="pixels")
        result = Panel([twin, pixels]).evaluate_pipeline(student, num_images=5000)
        ```
    """

    def __init__(self, judges: Sequence[Evaluator]):
        for judge in judges:
            require(judge.role is not None, "role", None, f"one of {sorted(ROLES)} for the judge {judge.name!r}")
        titles = [(judge.name, judge.role) for judge in judges]
        twice = sorted({f"{name} ({role})" for name, role in titles if titles.count((name, role)) > 1})
        require(not twice, "judges", twice, "of different names or roles")
        may_judge = any(judge.role != "guide" for judge in judges)
        require(may_judge, "judges", titles, "of another role than 'guide', one at least")
        references = {judge.reference.fingerprint: judge.reference for judge in judges if judge.reference is not None}
        names = sorted(reference.name for reference in references.values())
        require(len(references) <= 1, "judges", names, "of one reference")
        order = list(ROLES)
        self.judges = tuple(sorted(judges, key=lambda judge: order.index(judge.role)))
        self.main = self.judges[0]
        self.reference = self.main.reference
        self.metrics = self.main.metrics
        self.batch_size = self.main.batch_size
        self.seed = self.main.seed
        self.accelerator = self.main.accelerator
        self.is_main_process = self.main.is_main_process

    def evaluate(self, images: torch.Tensor | Iterable[torch.Tensor]) -> PanelResult:
        """Evaluate images; see `Evaluator.evaluate`."""
        return PanelResult(tuple(evaluate_images(self.judges, images, self.seed)))

    def evaluate_pipeline(
        self,
        pipeline: "RCFDPipeline | Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]",
        num_images: int = 50_000,
        num_inference_steps: int | None = None,
        *,
        seed: int | None = None,
        progress: bool = True,
        **options,
    ) -> PanelResult:
        """Sample images once and let every judge evaluate them; see `Evaluator.evaluate_pipeline`."""
        seed = self.seed if seed is None else seed
        for judge in self.judges:
            judge.check_number(num_images)
        images = self.main.draw(pipeline, num_images, num_inference_steps, seed=seed, progress=progress, **options)
        return PanelResult(tuple(evaluate_images(self.judges, images, seed)))


def load_panel(
    judges: Sequence[str],
    reference: "ImageData",
    *,
    metrics: Sequence[str] = ("fd",),
    accelerator: "Accelerator | None" = None,
    **options,
) -> Panel:
    """The panel that options name.

    Args:
        judges (`Sequence[str]`): each "pixels", or "ROLE=PLACE": one of "guide", "twin" and "foreign", and a folder, a
            Hub id, a timm name, "inception" or "efficientnet-lite0" (of the extra `judges`); "@N" after the place
            enlarges images to N pixels, "NAME:" before it is what tables call the judge: "twin=mlp:runs/mlp@28".
        reference (`ImageData`): the real images.
        metrics (`Sequence[str]`, defaults to `("fd",)`): of each judge; pixels have no "is".
        accelerator (`Accelerator`, *optional*): the processes to share the work among.
        options: further arguments of each `Evaluator`.

    Raises:
        ValueError: for another form, and for what `Panel` and `Evaluator` refuse.
    """
    options |= {"accelerator": accelerator}
    return Panel([_load_judge(judge, reference, metrics, options) for judge in judges])


def load_judges(
    config: EvaluationConfig, reference: "ImageData", accelerator: "Accelerator | None" = None
) -> Evaluator | Panel:
    """The panel of `config.judges`; without them the one evaluator of `load_evaluator`, with the same arguments."""
    if not config.judges:
        return load_evaluator(config, reference, accelerator)
    return load_panel(
        config.judges,
        reference,
        metrics=config.metrics,
        accelerator=accelerator,
        batch_size=config.eval_batch_size,
        cache_dir=config.statistics_dir,
        seed=config.seed,
    )


def default_judges(twin: str | None = None) -> list[str]:
    """The judges at hand: a twin in a folder, pixels, and a foreign network where the extra `judges` is installed."""
    return [*([f"twin={twin}"] if twin else []), "pixels", *([f"foreign={LITE0}@64"] if has_lite0() else [])]


def _load_judge(judge: str, reference, metrics, options) -> Evaluator:
    if judge == "pixels":
        distances = [metric for metric in metrics if metric != "is"] or ["fd"]
        return Evaluator(PixelExtractor(reference.image_shape), reference, metrics=distances, role="pixels", **options)
    role, equals, place = judge.partition("=")
    allowed = "'pixels' or 'ROLE=PLACE' with a role of 'guide', 'twin' and 'foreign'"
    require(bool(equals and place) and role in ROLES and role != "pixels", "judges", judge, allowed)
    name, colon, rest = place.partition(":")
    named = bool(colon) and not Path(place).exists() and name not in ("hf-hub", "local-dir")
    name, place = (name, rest) if named else (None, place)
    place, size = _split_size(place)
    extractor, own_name = _load_extractor(place, size)
    accuracy = held_out_accuracy(Path(place))
    return Evaluator(
        extractor, reference, name=name or own_name, metrics=metrics, role=role, accuracy=accuracy, **options
    )


def _split_size(place: str) -> tuple[str, int | None]:
    folder, at, number = place.rpartition("@")
    if at and number.isdecimal() and not Path(place).exists():
        return folder, int(number)
    return place, None


def _load_extractor(place: str, image_size: int | None) -> tuple[torch.nn.Module, str]:
    """The network at a place, and its name."""
    if place == "inception":
        from diffusers_rcfd.evaluation.inception import InceptionExtractor

        extractor = InceptionExtractor()
        return extractor, extractor.name
    if place == LITE0:
        return load_lite0(image_size or 64), LITE0
    from diffusers_rcfd.models.feature_classifier import load_feature_classifier

    size = {} if image_size is None else {"image_size": image_size}
    return load_feature_classifier(place, **size), Path(place).name


def held_out_accuracy(folder: Path) -> float | None:
    """The last held-out accuracy that the metrics of a trained classifier tell; None where there is none."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return None
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    accuracies = [line["held_out_accuracy"] for line in lines if "held_out_accuracy" in line]
    return accuracies[-1] if accuracies else None
