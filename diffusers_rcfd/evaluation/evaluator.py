"""How good generated images are: FID, IS, KID, precision and recall, on Inception or on any feature classifier."""

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch_fidelity.metric_fid import fid_features_to_statistics
from tqdm.auto import tqdm

from diffusers_rcfd.data.image_tensors import to_model_range
from diffusers_rcfd.evaluation.config import EvaluationConfig
from diffusers_rcfd.evaluation.inception import InceptionExtractor
from diffusers_rcfd.evaluation.metrics import (
    bootstrap_interval,
    fd_with_influence,
    inception_score_with_influence,
    kid_with_blocks,
    precision_recall_with_hits,
)
from diffusers_rcfd.evaluation.sampling import as_uint8, generate_images
from diffusers_rcfd.validation import require, require_count

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffusers_rcfd.data.image_data import ImageData
    from diffusers_rcfd.models.feature_classifier import FeatureClassifier
    from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline

# The fewest images a metric is defined for: IS is a mean over 10 splits, precision and recall look at neighbour 3.
MIN_IMAGES = {"fd": 2, "is": 10, "kid": 2, "precision": 4, "recall": 4}
SHORT_NAMES = {"fd": "FD", "is": "IS", "kid": "KID", "precision": "precision", "recall": "recall"}


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
        seed (`int`): of the images where the evaluator sampled them, and of splits, subsets and bootstrap.
        extractor (`str`): name of the network that the features come from.
        reference (`str` or None): name of the reference data set.
        num_reference_images (`int`): its size.
        reference_key (`str`): hash of data set, size and extractor with its weights; numbers with
            the same key compare.
    """

    metrics: dict[str, MetricValue]
    num_images: int
    seed: int
    extractor: str
    reference: str | None
    num_reference_images: int
    reference_key: str

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

    With Inception the Frechet distance is labelled "FID"; with a classifier named X it is "FD(X)", and likewise for
    the other metrics. The metrics are torch-fidelity's (10 IS splits; 100 KID subsets of up to 1000 images; the third
    neighbour for precision and recall), but for the Frechet distance, see `frechet_distance`.

    Confidence intervals are bootstraps of means. FD and IS resample their influence functions: recomputing FD on each
    resample would be dear, and biased upwards by the images that resampling repeats. They describe the choice of the
    generated images against a fixed reference, to first order, without the bias that FD has at small numbers. KID
    resamples its values on disjoint blocks, which describes the choice of both sets; precision and recall resample
    their hits, with the manifolds held fixed (recall: those of the reference images).

    Under `accelerate launch` each process extracts its share, and every process gets the same result.

    Args:
        extractor (`FeatureClassifier` or `InceptionExtractor`): called with images (B, C, H, W) in [-1, 1], returns
            `.features` (B, D) and `.logits` (B, K). It is put in evaluation mode.
        reference (`ImageData` or None): the real images. None is allowed where IS is the only metric.
        name (`str`, *optional*): what a classifier is reported as; its `config.backbone` by default.
        metrics (`Sequence[str]`, defaults to `("fd", "is")`): of "fd", "is", "kid", "precision", "recall".
        batch_size (`int`, defaults to 256): images at a time, for each process.
        cache_dir (`str`, `os.PathLike` or False, *optional*): where statistics of the reference are kept (with its
            features for KID, precision and recall); a folder in the Hugging Face home by default, False for nowhere.
        seed (`int`, defaults to 0): of splits, subsets, bootstrap, and of the images that are sampled here.
        accelerator (`Accelerator`, *optional*): the processes to share the work among; its device is used.

    Raises:
        TypeError: for an extractor or a reference without the attributes named above.
        ValueError: for an unknown metric, or an argument not allowed.
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
    ):
        metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        for metric in metrics:
            require(metric in MIN_IMAGES, "metrics", metric, f"of {sorted(MIN_IMAGES)}")
        require(len(metrics) > 0, "metrics", metrics, f"one or more of {sorted(MIN_IMAGES)}")
        require_count("batch_size", batch_size, 1)
        require_count("seed", seed, 0)
        if not isinstance(extractor, torch.nn.Module):
            raise TypeError(f"`extractor` must be a FeatureClassifier or InceptionExtractor, got {type(extractor)}.")
        attributes = ("__len__", "__getitems__", "image_shape", "name", "fingerprint")
        if reference is None:
            require(set(metrics) == {"is"}, "reference", None, f"a data set for the metrics {metrics}")
        elif not all(hasattr(reference, attribute) for attribute in attributes):
            raise TypeError(f"`reference` must be an ImageData, with {attributes}, got {type(reference)}.")
        self.is_inception = isinstance(extractor, InceptionExtractor)
        backbone = getattr(getattr(extractor, "config", None), "backbone", None)
        self.name = extractor.name if self.is_inception else name or backbone
        require(self.name, "name", name, "given for a classifier without `config.backbone`")
        self.extractor = extractor.eval()
        if accelerator is not None:
            self.extractor.to(accelerator.device)
        self.reference, self.metrics, self.batch_size, self.seed = reference, metrics, batch_size, seed
        self.accelerator = accelerator
        self.cache_dir = Path(HF_HOME, "diffusers_rcfd") if cache_dir in (None, True) else cache_dir
        source = (reference.fingerprint, len(reference), tuple(reference.image_shape)) if reference is not None else ()
        self.reference_key = hashlib.sha256(repr((source, self.name, _fingerprint(extractor))).encode()).hexdigest()
        self._statistics = None

    def label(self, metric: str) -> str:
        """The name that a metric is reported under: "FID", or "FD(X)" for a classifier X."""
        if self.is_inception:
            return "FID" if metric == "fd" else SHORT_NAMES[metric]
        return f"{SHORT_NAMES[metric]}({self.name})"

    def evaluate(self, images: torch.Tensor | Iterable[torch.Tensor]) -> EvaluationResult:
        """Evaluate images; of several processes each gives its own part of them.

        Args:
            images (`torch.Tensor` or an iterable of batches): (B, C, H, W), uint8 or floats in [0, 1], of the
                reference's shape.

        Raises:
            TypeError: for images of another number type.
            ValueError: for NaN, values out of range, shapes that differ from each other or from the reference, fewer
                images than a metric is defined for, or features that are not finite.
        """
        return self._evaluate(images, self.seed)

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
        require_count("num_images", num_images, 1)
        self._check_number(num_images)
        options.setdefault("batch_size", self.batch_size)
        if self.reference is not None:
            options.setdefault("image_shape", tuple(self.reference.image_shape))
        images = generate_images(
            pipeline,
            num_images,
            num_inference_steps=num_inference_steps,
            seed=seed,
            indices=self._share(num_images),
            progress=progress and self.is_main_process,
            **options,
        )
        return self._evaluate(images, seed)

    def _evaluate(self, images, seed):
        shape = None if self.reference is None else tuple(self.reference.image_shape)
        features, logits = self._extract([images] if isinstance(images, torch.Tensor) else images, shape)
        self._check_number(len(features))
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
            reference=None if self.reference is None else self.reference.name,
            num_reference_images=0 if self.reference is None else len(self.reference),
            reference_key=self.reference_key[:16],
        )

    def _compute(self, features, logits, reference, seed) -> dict[str, MetricValue]:
        seed32 = seed % 2**32  # the range of numpy's RandomState
        found = {}
        if "fd" in self.metrics:
            mu, sigma = reference["mu"].numpy(), reference["sigma"].numpy()
            found["fd"] = fd_with_influence(features, mu, sigma, len(self.reference), self.label("fd"))
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

    @torch.no_grad()
    def _extract(self, batches, shape):
        """Features (n, D) and logits (n, K) in float32 of the images of all processes, in rank order."""
        features, logits, count = [torch.empty(0, 0)], [torch.empty(0, 0)], 0
        for batch in batches:
            images = as_uint8(batch, first=count)
            shape = shape or tuple(images.shape[1:])
            require(images.shape[1:] == shape, "images", tuple(images.shape[1:]), f"{shape}, as {self._whose_shape}")
            for part in images.split(self.batch_size):
                output = self.extractor(to_model_range(part.to(self._device)))
                for name, rows in (("features", features), ("logits", logits)):
                    values = getattr(output, name).float().cpu()
                    require(values.isfinite().all(), name, "NaN or infinity", f"finite, from {self.name}")
                    rows.append(values)
            count += len(images)
        return tuple(self._gather(torch.cat(rows[1:] or rows)) for rows in (features, logits))

    def _reference_statistics(self) -> dict[str, torch.Tensor]:
        """`mu` (D,) and `sigma` (D, D) of the reference, and its `features` where a metric needs them."""
        need_features = not set(self.metrics) <= {"fd", "is"}
        if self._statistics is None:
            path = self._cache_path()
            statistics = _read_statistics(path, len(self.reference), need_features)
            found = torch.tensor([statistics is not None], device=self._device)
            if self._num_processes > 1:
                found = self.accelerator.gather(found)
            if not found.all():
                features, _ = self._extract(self._reference_batches(), tuple(self.reference.image_shape))
                moments = fid_features_to_statistics(features.double())
                statistics = {
                    "mu": torch.from_numpy(moments["mu"]),
                    "sigma": torch.from_numpy(np.atleast_2d(moments["sigma"])),
                    "num_images": torch.tensor(len(features)),
                } | ({"features": features} if need_features else {})
                if self.is_main_process:
                    _write_statistics(path, statistics)
            self._statistics = statistics
        return self._statistics

    def _reference_batches(self):
        share = self._share(len(self.reference))
        hidden = {} if self.is_main_process else {"disable": True}
        bar = {"desc": f"Reading {self.reference.name}", "delay": 1} | hidden
        for start in tqdm(range(0, len(share), self.batch_size), unit="batch", **bar):
            yield self.reference.__getitems__(list(share[start : start + self.batch_size]))["images"]

    def _cache_path(self) -> Path | None:
        if self.cache_dir is False:
            return None
        readable = re.sub(r"[^\w.-]+", "-", f"{self.reference.name}-{len(self.reference)}-{self.name}")
        return Path(self.cache_dir, f"{readable[:80]}-{self.reference_key[:16]}.safetensors")

    def _check_number(self, num_images):
        sizes = {"num_images": num_images}
        if self.reference is not None and set(self.metrics) != {"is"}:
            sizes["len(reference)"] = len(self.reference)
        for field, size in sizes.items():
            for metric in self.metrics:
                require(size >= MIN_IMAGES[metric], field, size, f"at least {MIN_IMAGES[metric]} for {metric!r}")

    @property
    def _whose_shape(self):
        return "the first batch" if self.reference is None else f"the reference {self.reference.name!r}"

    @property
    def _device(self):
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

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes in rank order, on each of them."""
        if self._num_processes == 1:
            return rows
        device = self.accelerator.device
        shapes = self.accelerator.gather(torch.tensor([rows.shape], device=device)).cpu()  # (processes, 2)
        most, width = shapes.max(0).values.tolist()
        padded = torch.zeros(most, width, device=device)
        padded[: len(rows), : rows.shape[1]] = rows
        parts = self.accelerator.gather(padded).cpu().view(-1, most, width)
        return torch.cat([part[:count] for part, count in zip(parts, shapes[:, 0].tolist(), strict=True)])


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
    )


def _read_statistics(path: Path | None, num_images: int, need_features: bool) -> dict[str, torch.Tensor] | None:
    """The cached statistics of the reference, or None where they are absent or hold no features that are needed."""
    if path is None or not path.is_file():
        return None
    try:
        statistics = load_file(path)
    except SafetensorError as error:
        warnings.warn(f"The statistics in {path} are unreadable ({error}) and computed anew.", stacklevel=2)
        return None
    found = statistics["num_images"].item()
    require(found == num_images, "reference", f"statistics of {found} images in {path}", f"of {num_images} images")
    return statistics if "features" in statistics or not need_features else None


def _write_statistics(path: Path | None, statistics: dict[str, torch.Tensor]) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        save_file(statistics, partial)
        os.replace(partial, path)
    except OSError as error:
        warnings.warn(f"The statistics of the reference could not be cached in {path}: {error}", stacklevel=2)
