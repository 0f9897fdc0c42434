"""How good generated images are: FID, IS, KID, precision and recall, on Inception or on any feature classifier."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm

from diffusers_rcfd.data.datasets import as_image_dataset
from diffusers_rcfd.data.image_tensors import to_model_range, to_uint8
from diffusers_rcfd.evaluation.config import EvaluationConfig
from diffusers_rcfd.evaluation.inception import InceptionExtractor
from diffusers_rcfd.evaluation.metrics import (
    bootstrap_interval,
    fd_with_influence,
    inception_score_with_influence,
    kid_with_blocks,
    mean_and_covariance,
    precision_recall_with_hits,
)
from diffusers_rcfd.evaluation.sampling import as_uint8, generate_images
from diffusers_rcfd.evaluation.statistics import (
    FeatureStatistics,
    read_cache,
    read_statistics,
    write_cache,
    write_statistics,
)
from diffusers_rcfd.validation import require, require_count

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffusers_rcfd.data.image_data import ImageData
    from diffusers_rcfd.models.feature_classifier import FeatureClassifier
    from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline

# The fewest images a metric is defined for: IS is a mean over 10 splits, precision and recall look at neighbour 3.
MIN_IMAGES = {"fd": 2, "is": 10, "kid": 2, "precision": 4, "recall": 4}
SHORT_NAMES = {"fd": "FD", "is": "IS", "kid": "KID", "precision": "precision", "recall": "recall"}

# What a judge is to the models that it measures, the one that says most of them first.
ROLES = {
    "foreign": "trained on other data",
    "twin": "of the guide's kind, trained on the same data",
    "pixels": "no network",
    "guide": "a loss has seen it: shown only to expose cheating",
}


def _fingerprint(extractor: torch.nn.Module) -> str:
    """Hash of the weights and the configuration of a network."""
    config = getattr(extractor, "config", {})
    config = config if isinstance(config, Mapping) else vars(config)
    config = {key: value for key, value in config.items() if not key.startswith("_")}  # `_name_or_path` is a place
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for key, value in sorted(extractor.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class MetricValue:
    """One number, the name it may be reported under, and its 95 % bootstrap confidence interval."""

    label: str
    value: float
    confidence_interval: tuple[float, float]


@dataclass(frozen=True)
class EvaluationResult:
    """What `Evaluator.evaluate` found; `result["fd"]` is the number alone.

    Args:
        metrics (`dict[str, MetricValue]`): by metric key.
        num_images (`int`): generated images.
        seed (`int`): of the images, if the evaluator drew them, and of splits, subsets and bootstrap.
        extractor (`str`): name of the network that the features come from.
        reference (`str` or None): name of the reference data set.
        num_reference_images (`int` or None): its size; None for statistics that do not say it.
        reference_key (`str`): hash of data set, size and extractor with its weights; numbers with
            the same key compare.
        role (`str`, *optional*): of `ROLES`: what the extractor is to the model that was measured.
        accuracy (`float`, *optional*): of the extractor on held-out real images, in 0..1.
    """

    metrics: dict[str, MetricValue]
    num_images: int
    seed: int
    extractor: str
    reference: str | None
    num_reference_images: int | None
    reference_key: str
    role: str | None = None
    accuracy: float | None = None

    def __getitem__(self, metric: str) -> float:
        return self.metrics[metric].value

    def score(self, metric: str) -> float:
        """A metric with the sign that makes higher better."""
        return -self[metric] if metric in ("fd", "kid") else self[metric]

    @property
    def named_values(self) -> dict[str, float]:
        """The numbers alone, by the names they are reported under."""
        return {metric.label: metric.value for metric in self.metrics.values()}

    def __str__(self) -> str:
        values = [
            f"{m.label} {m.value:.4g} [{m.confidence_interval[0]:.4g}, {m.confidence_interval[1]:.4g}]"
            for m in self.metrics.values()
        ]
        return f"{', '.join(values)} ({self.num_images} images, seed {self.seed}, reference {self.reference})"

    def to_dict(self) -> dict:
        """The result in types that JSON has."""
        return json.loads(json.dumps(asdict(self)))


class Evaluator:
    """Compares sets of generated images with a reference data set by the features of one network.

    With Inception the Frechet distance is labelled "FID"; with a classifier named X it is "FD(X)", or "FD(X, twin)"
    for one whose role is given, and likewise for the other metrics. The metrics are torch-fidelity's (10 IS splits;
    100 KID subsets of up to 1000 images; the third neighbour for precision and recall), but for the Frechet distance,
    see `frechet_distance`.

    Confidence intervals are bootstraps of means. FD and IS resample their influence functions: to compute FD again on
    each resample would be slow, and biased upwards by the images that resampling repeats. These intervals describe the
    choice of the generated images against a fixed reference, to first order, without the bias that FD has at small
    numbers. KID resamples its values on disjoint blocks, which describes the choice of both sets. Precision and recall
    resample their hits, with the manifolds fixed (recall: those of the reference images).

    Under `accelerate launch` each process extracts its share, and every process gets the same result.

    Args:
        extractor (`FeatureClassifier` or `InceptionExtractor`): called with images (B, C, H, W) in [-1, 1], returns
            `.features` (B, D) and `.logits` (B, K). It is put in evaluation mode.
        reference (`ImageData` or None): the real images. None is allowed for IS alone, and for FD and IS with
            `reference_statistics`.
        name (`str`, *optional*): what a classifier is called in reports; its `config.backbone` by default.
        metrics (`Sequence[str]`, defaults to `("fd", "is")`): of "fd", "is", "kid", "precision", "recall".
        batch_size (`int`, defaults to 256): images at a time, for each process.
        cache_dir (`str`, `os.PathLike` or False, *optional*): folder that keeps the statistics of the reference (with
            its features for KID, precision and recall); by default in the Hugging Face home, False for none.
        seed (`int`, defaults to 0): of splits, subsets and bootstrap, and of the images of `evaluate_pipeline`.
        accelerator (`Accelerator`, *optional*): the processes to share the work among; its device is used.
        role (`str`, *optional*): of `ROLES`, written beside the name: "guide" (a loss has seen the extractor), "twin"
            (of the guide's kind, trained on the same data), "foreign" (trained on other data) or "pixels".
        accuracy (`float`, *optional*): of a classifier on held-out real images, in 0..1; tables show it.
        reference_statistics (`str` or `os.PathLike`, *optional*): file with the mean and the covariance of the
            reference's features, read in place of the images where "fd" and "is" are the only metrics; see
            `read_statistics`.

    Raises:
        TypeError: for an extractor or a reference without the attributes named above.
        ValueError: for an unknown metric or role, statistics of another size, or an argument not allowed.

    Example:
        ```python
        judge = FeatureClassifier.from_pretrained("runs/digits/evaluator")
        evaluator = Evaluator(judge, load_image_data(), name="resnet10-digits", role="twin")
        print(evaluator.evaluate_pipeline(student, num_images=5000))
        ```
    """

    def __init__(
        self,
        extractor: "FeatureClassifier | InceptionExtractor",
        reference: "ImageData | None",
        *,
        name: str | None = None,
        metrics: Sequence[str] = ("fd", "is"),
        batch_size: int = 256,
        cache_dir: str | os.PathLike | bool | None = None,
        seed: int = 0,
        accelerator: "Accelerator | None" = None,
        role: str | None = None,
        accuracy: float | None = None,
        reference_statistics: str | os.PathLike | None = None,
    ):
        metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        _check_metrics(metrics, extractor)
        reference = None if reference is None else as_image_dataset(reference, "reference")
        _check_reference(reference, metrics, {"is"} if reference_statistics is None else {"is", "fd"})
        batch_size = require_count("batch_size", batch_size, 1)
        seed = require_count("seed", seed, 0)
        require(role is None or role in ROLES, "role", role, f"None or one of {sorted(ROLES)}")
        require(accuracy is None or 0 <= accuracy <= 1, "accuracy", accuracy, "None or in 0..1")
        self.is_inception = isinstance(extractor, InceptionExtractor)
        backbone = getattr(getattr(extractor, "config", None), "backbone", None)
        self.name = extractor.name if self.is_inception else name or backbone or getattr(extractor, "name", None)
        require(self.name, "name", name, "given for a classifier without `config.backbone`")
        self.extractor = extractor.eval()
        if accelerator is not None:
            self.extractor.to(accelerator.device)
        self.reference = reference
        self.metrics = metrics
        self.batch_size = batch_size
        self.seed = seed
        self.role = role
        self.accuracy = accuracy
        self.accelerator = accelerator
        self.cache_dir = Path(HF_HOME, "diffusers_rcfd") if cache_dir in (None, True) else cache_dir
        self._given = None if reference_statistics is None else read_statistics(reference_statistics)
        self.reference_name = None if reference is None else reference.name
        source = () if reference is None else (reference.fingerprint, len(reference), tuple(reference.image_shape))
        if self._given is not None:
            self._check_size(getattr(extractor, "num_features", None))
            self.reference_name = self.reference_name or Path(reference_statistics).stem
            source += (hashlib.sha256(self._given.mu.tobytes() + self._given.sigma.tobytes()).hexdigest(),)
        self.reference_key = hashlib.sha256(repr((source, self.name, _fingerprint(extractor))).encode()).hexdigest()
        self._statistics = None

    @property
    def title(self) -> str:
        """Name and role."""
        return self.name if self.role in (None, self.name) else f"{self.name}, {self.role}"

    def label(self, metric: str) -> str:
        """The name that a metric is reported under: "FID", or "FD(X)" for a classifier X; with the role, if given."""
        if not self.is_inception:
            return f"{SHORT_NAMES[metric]}({self.title})"
        short = "FID" if metric == "fd" else SHORT_NAMES[metric]
        return short if self.role is None else f"{short} ({self.role})"

    def evaluate(self, images: torch.Tensor | Iterable[torch.Tensor]) -> EvaluationResult:
        """Evaluate images; each of several processes gives its own part of them.

        Args:
            images (`torch.Tensor` or an iterable of batches): (B, C, H, W), uint8 or floats in [0, 1], of the
                reference's shape.

        Raises:
            TypeError: for images of another number type.
            ValueError: for NaN, values out of range, shapes that differ from each other or from the reference, fewer
                images than a metric is defined for, or features that are not finite.
        """
        return evaluate_images([self], images, self.seed)[0]

    def evaluate_pipeline(
        self,
        pipeline: "RCFDPipeline | Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]",
        num_images: int = 50_000,
        num_inference_steps: int | None = None,
        *,
        seed: int | None = None,
        progress: bool = True,
        **options,
    ) -> EvaluationResult:
        """Sample images with `generate_images`, which documents the arguments, and evaluate them.

        `seed` defaults to the evaluator's, `batch_size` and `image_shape` to the evaluator's and the reference's.
        """
        seed = self.seed if seed is None else seed
        images = self.draw(pipeline, num_images, num_inference_steps, seed=seed, progress=progress, **options)
        return evaluate_images([self], images, seed)[0]

    def draw(
        self, pipeline, num_images: int, num_inference_steps: int | None, *, seed: int, progress: bool, **options
    ) -> Iterable[torch.Tensor]:
        """This process's share of the images that `evaluate_pipeline` evaluates, in batches."""
        num_images = require_count("num_images", num_images, 1)
        self.check_number(num_images)
        options.setdefault("batch_size", self.batch_size)
        if self.reference is not None:
            options.setdefault("image_shape", tuple(self.reference.image_shape))
        return generate_images(
            pipeline,
            num_images,
            num_inference_steps=num_inference_steps,
            seed=seed,
            indices=self._share(num_images),
            progress=progress and self.is_main_process,
            **options,
        )

    def save_reference_statistics(self, path: str | os.PathLike) -> None:
        """Write mean and covariance of the reference's features, on the main process; see `write_statistics`."""
        statistics = self._reference_statistics()
        if self.is_main_process:
            mu, sigma = statistics["mu"].numpy(), statistics["sigma"].numpy()
            write_statistics(FeatureStatistics(mu, sigma, self.num_reference_images), path)

    @torch.no_grad()
    def extract(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, D) and logits (B, K) of uint8 images (B, C, H, W), in float32 on the CPU."""
        features, logits = [], []
        for part in images.split(self.batch_size):
            output = self.extractor(to_model_range(part.to(self._device)))
            for name, rows in (("features", features), ("logits", logits)):
                values = getattr(output, name).float().cpu()
                require(values.isfinite().all(), name, "NaN or infinity", f"finite, from {self.name}")
                rows.append(values)
        return torch.cat(features), torch.cat(logits)

    def judge(self, features: torch.Tensor, logits: torch.Tensor, seed: int) -> EvaluationResult:
        """The result of the images of all processes, from their `extract`ed features and logits."""
        self.check_number(len(features))
        if self._given is not None:
            self._check_size(features.shape[1])
        reference = self._reference_statistics() if set(self.metrics) != {"is"} else {}
        metrics = [self._compute(features, logits, reference, seed) if self.is_main_process else None]
        if self._num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(metrics)
        return EvaluationResult(
            metrics=metrics[0],
            num_images=len(features),
            seed=seed,
            extractor=self.name,
            reference=self.reference_name,
            num_reference_images=self.num_reference_images,
            reference_key=self.reference_key[:16],
            role=self.role,
            accuracy=self.accuracy,
        )

    @property
    def num_reference_images(self) -> int | None:
        """Size of the reference data set; None where only its statistics are known, and they do not say it."""
        if self._given is not None:
            return self._given.num_images
        return 0 if self.reference is None else len(self.reference)

    def _compute(self, features, logits, reference, seed) -> dict[str, MetricValue]:
        seed32 = seed % 2**32  # the range of numpy's RandomState
        found = {}
        if "fd" in self.metrics:
            mu, sigma = reference["mu"].numpy(), reference["sigma"].numpy()
            found["fd"] = fd_with_influence(features, mu, sigma, self.num_reference_images, self.label("fd"))
        if "is" in self.metrics:
            found["is"] = inception_score_with_influence(logits, seed32)
        if "kid" in self.metrics:
            found["kid"] = kid_with_blocks(features, reference["features"], seed32)
        if {"precision", "recall"} & set(self.metrics):
            found |= precision_recall_with_hits(features, reference["features"], self._device)
        values = {}
        for metric in self.metrics:
            interval = bootstrap_interval(*found[metric], seed)
            least = {"fd": 0.0, "is": 1.0}.get(metric, -math.inf)
            interval = tuple(max(bound, least) for bound in interval)
            values[metric] = MetricValue(self.label(metric), found[metric][0], interval)
        return values

    def _reference_statistics(self) -> dict[str, torch.Tensor]:
        """`mu` (D,) and `sigma` (D, D) of the reference, and its `features` where a metric needs them."""
        need_features = not set(self.metrics) <= {"fd", "is"}
        if self._statistics is None:
            self._statistics = self._images_statistics(need_features) if self._given is None or need_features else {}
            if self._given is not None:
                mu, sigma = torch.from_numpy(self._given.mu), torch.from_numpy(self._given.sigma)
                self._statistics = self._statistics | {"mu": mu, "sigma": sigma}
        return self._statistics

    def _images_statistics(self, need_features) -> dict[str, torch.Tensor]:
        path = self._cache_path()
        statistics = read_cache(path, len(self.reference), need_features)
        found = torch.tensor([statistics is not None], device=self._device)
        if self._num_processes > 1:
            found = self.accelerator.gather(found)
        if found.all():
            return statistics
        ((features, _),) = extract_features([self], self._reference_batches())
        mu, sigma = mean_and_covariance(features)
        statistics = {"mu": torch.from_numpy(mu), "sigma": torch.from_numpy(sigma)}
        statistics |= {"num_images": torch.tensor(len(features))} | ({"features": features} if need_features else {})
        if self.is_main_process:
            write_cache(path, statistics)
        return statistics

    def _reference_batches(self):
        share = self._share(len(self.reference))
        hidden = {} if self.is_main_process else {"disable": True}
        bar = {"desc": f"Reading {self.reference.name}", "delay": 1} | hidden
        for start in tqdm(range(0, len(share), self.batch_size), unit="batch", **bar):
            images = self.reference.__getitems__(list(share[start : start + self.batch_size]))["images"]
            yield images if images.dtype == torch.uint8 else to_uint8(images)

    def _cache_path(self) -> Path | None:
        if self.cache_dir is False:
            return None
        readable = re.sub(r"[^\w.-]+", "-", f"{self.reference.name}-{len(self.reference)}-{self.name}")
        return Path(self.cache_dir, f"{readable[:80]}-{self.reference_key[:16]}.safetensors")

    def _check_size(self, num_features):
        size = self._given.mu.size
        fits = num_features in (None, size)
        require(fits, "reference_statistics", size, f"of {num_features} dimensions, as the features of {self.name}")

    def check_number(self, num_images: int) -> None:
        """Raise a `ValueError` for fewer images than a metric is defined for."""
        sizes = {"num_images": num_images}
        if self.reference is not None and set(self.metrics) != {"is"}:
            sizes["len(reference)"] = len(self.reference)
        for field, size in sizes.items():
            for metric in self.metrics:
                require(size >= MIN_IMAGES[metric], field, size, f"at least {MIN_IMAGES[metric]} for {metric!r}")

    @property
    def _device(self):
        if self.accelerator is not None:
            return self.accelerator.device
        return next((x.device for x in self.extractor.state_dict().values()), torch.device("cpu"))

    @property
    def _num_processes(self):
        return 1 if self.accelerator is None else self.accelerator.num_processes

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that computes and writes."""
        return self.accelerator is None or self.accelerator.is_main_process

    def _share(self, n: int) -> range:
        """This process's part of 0..n - 1; the parts in rank order are the whole in order."""
        rank = 0 if self.accelerator is None else self.accelerator.process_index
        return range(rank * n // self._num_processes, (rank + 1) * n // self._num_processes)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes in rank order, on each of them."""
        if self._num_processes == 1:
            return rows
        device = self.accelerator.device
        shapes = self.accelerator.gather(torch.tensor([rows.shape], device=device)).cpu()  # (processes, 2)
        most, width = shapes.max(0).values.tolist()
        padded = torch.zeros(most, width, device=device)
        padded[: len(rows), : rows.shape[1]] = rows
        parts = self.accelerator.gather(padded).cpu().view(len(shapes), most, width)
        return torch.cat([part[:count] for part, count in zip(parts, shapes[:, 0].tolist(), strict=True)])


def _check_metrics(metrics: tuple[str, ...], extractor) -> None:
    for metric in metrics:
        require(metric in MIN_IMAGES, "metrics", metric, f"of {sorted(MIN_IMAGES)}")
    require(len(metrics) > 0, "metrics", metrics, f"one or more of {sorted(MIN_IMAGES)}")
    if not isinstance(extractor, torch.nn.Module):
        raise TypeError(f"`extractor` must be a FeatureClassifier or InceptionExtractor, got {type(extractor)}.")
    has_logits = getattr(extractor, "has_logits", True)
    require(has_logits or "is" not in metrics, "metrics", metrics, "free of 'is' for features without classes")


def _check_reference(reference, metrics: tuple[str, ...], without_images: set[str]) -> None:
    """`without_images` are the metrics that need no reference images."""
    attributes = ("__len__", "__getitems__", "image_shape", "name", "fingerprint")
    if reference is None:
        require(set(metrics) <= without_images, "reference", None, f"a data set for the metrics {metrics}")
    elif not all(hasattr(reference, attribute) for attribute in attributes):
        raise TypeError(f"`reference` must be an ImageData, with {attributes}, got {type(reference)}.")


def extract_features(
    judges: Sequence[Evaluator], batches: Iterable[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each judge sees of the same images, which are read once.

    Args:
        judges (`Sequence[Evaluator]`): with one reference and one accelerator.
        batches (`Iterable[torch.Tensor]`): as `Evaluator.evaluate` takes them; the share of this process.

    Returns:
        `list[tuple[torch.Tensor, torch.Tensor]]`: for each judge features (n, D) and logits (n, K) of the images of
        all processes, in rank order.
    """
    reference = next((judge.reference for judge in judges if judge.reference is not None), None)
    shape = None if reference is None else tuple(reference.image_shape)
    whose = "the first batch" if reference is None else f"the reference {reference.name!r}"
    rows = [[] for _ in judges]
    count = 0
    for batch in batches:
        images = as_uint8(batch, first=count)
        shape = shape or tuple(images.shape[1:])
        require(images.shape[1:] == shape, "images", tuple(images.shape[1:]), f"{shape}, as {whose}")
        if len(images):
            for judge, own in zip(judges, rows, strict=True):
                own.append(judge.extract(images))
        count += len(images)
    nothing = (torch.empty(0, 0), torch.empty(0, 0))
    return [
        tuple(judge.gather(torch.cat(parts)) for parts in zip(*(own or [nothing]), strict=True))
        for judge, own in zip(judges, rows, strict=True)
    ]


def evaluate_images(
    judges: Sequence[Evaluator], images: torch.Tensor | Iterable[torch.Tensor], seed: int
) -> list[EvaluationResult]:
    """The result of each judge on the same images; the arguments are those of `extract_features`."""
    batches = [images] if isinstance(images, torch.Tensor) else images
    extracted = extract_features(judges, batches)
    return [judge.judge(features, logits, seed) for judge, (features, logits) in zip(judges, extracted, strict=True)]


def load_evaluator(
    config: EvaluationConfig, reference: "ImageData | None", accelerator: "Accelerator | None" = None
) -> Evaluator:
    """The evaluator that options name: Inception, or the classifier `config.feature_extractor`.

    A classifier from a folder is reported under the folder's name, one from timm or the Hub under its own.

    Args:
        config (`EvaluationConfig`): the options.
        reference (`ImageData` or None): the real images.
        accelerator (`Accelerator`, *optional*): the processes to share the work among.

    Raises:
        FileNotFoundError: if Inception's weights or the classifier are not there.
        ValueError: for what `Evaluator` refuses.
    """
    from diffusers_rcfd.models.feature_classifier import load_feature_classifier

    name = config.feature_extractor
    extractor = InceptionExtractor(config.inception_weights) if name is None else load_feature_classifier(name)
    return Evaluator(
        extractor,
        reference,
        name=name and (config.extractor_name or Path(name).name),
        metrics=config.metrics,
        batch_size=config.eval_batch_size,
        cache_dir=config.statistics_dir,
        seed=config.seed,
        accelerator=accelerator,
        reference_statistics=config.reference_statistics,
    )
