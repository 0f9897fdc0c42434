"""How good generated images are: FID, IS, KID, precision and recall, on Inception or on any feature classifier."""

import hashlib
import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from tqdm.auto import tqdm

from diffusers_rcfd.image_tensors import to_model_range, to_uint8

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffusers_rcfd.feature_classifier import FeatureClassifier
    from diffusers_rcfd.image_data import ImageData
    from diffusers_rcfd.pipeline_rcfd import RCFDPipeline

# The fewest images a metric is defined for: IS is a mean over 10 splits, precision and recall look at neighbour 3.
MIN_IMAGES = {"fd": 2, "is": 10, "kid": 2, "precision": 4, "recall": 4}
SHORT_NAMES = {"fd": "FD", "is": "IS", "kid": "KID", "precision": "precision", "recall": "recall"}
INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[-1]


def image_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of image `index`, the same for every batch size, device and process count.

    PyTorch's CPU generator uses the low 32 bits of its seed. The multiplier is the prime next to 2^32 / golden ratio,
    which spreads the runs of nearby seeds so far apart that 50 000 images of any two seeds below 38 000 share none.
    """
    return torch.Generator().manual_seed((seed * 2654435761 + index) % 2**32)


def initial_noise(indices: Sequence[int], shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    """The noise z_T that `generate_images` starts images `indices` from, for samplers compared on the same noise.

    Args:
        indices (`Sequence[int]`): image numbers.
        shape (`tuple[int, int, int]`): (C, H, W).
        seed (`int`, defaults to 0): the seed of the whole set.

    Returns:
        `torch.Tensor`: unit Gaussian, float32, on the CPU, (B, C, H, W).
    """
    noise = [torch.randn(1, *shape, generator=image_generator(seed, i)) for i in indices]
    return torch.cat(noise) if noise else torch.empty(0, *shape)


def generate_images(
    pipeline: "RCFDPipeline | Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]",
    num_images: int,
    *,
    batch_size: int = 256,
    num_inference_steps: int | None = None,
    seed: int = 0,
    class_labels: str | Sequence[int] | torch.Tensor | None = "balanced",
    image_shape: tuple[int, int, int] | None = None,
    indices: Sequence[int] | None = None,
    progress: bool = True,
) -> Iterator[torch.Tensor]:
    """Sample images in batches, straight into uint8.

    Image i depends only on the model, `seed` and i (to float rounding), never on batch size or process count.

    Args:
        pipeline (`RCFDPipeline` or `Callable`): the model; or any sampler `(noise, labels) -> images`, which gets
            `initial_noise` (B, C, H, W) and labels (B,) or None, and returns uint8, or floats in [0, 1].
        num_images (`int`): images in the whole set.
        batch_size (`int`, defaults to 256): images at a time.
        num_inference_steps (`int`, *optional*): steps of a pipeline, its own default where not given.
        seed (`int`, defaults to 0): the seed of the whole set.
        class_labels (`"balanced"`, labels (num_images,) or None, defaults to `"balanced"`): of a class-conditional
            model; `"balanced"` gives image i the class i mod number of classes. An unconditional pipeline takes
            `"balanced"` or None, a sampler function labels or, for none, either of these.
        image_shape (`tuple[int, int, int]`, *optional*): (C, H, W), for a sampler function.
        indices (`Sequence[int]`, *optional*): the images to generate, all of 0..num_images - 1 by default.
        progress (`bool`, defaults to `True`): show a progress bar.

    Yields:
        `torch.Tensor`: uint8, on the CPU, (B, C, H, W).

    Raises:
        ValueError: for numbers, labels or steps not allowed, and for images that are NaN or outside [0, 1].
    """
    _require_int("num_images", num_images, 1)
    _require_int("batch_size", batch_size, 1)
    _require_int("seed", seed, 0)
    sample, num_classes = pipeline, None
    if hasattr(pipeline, "unet"):
        sample = partial(_sample, pipeline, num_inference_steps)
        image_shape, num_classes = pipeline.image_shape, pipeline.unet.config.num_class_embeds
    else:
        _require(image_shape is not None, "image_shape", None, "(C, H, W) for a sampler function")
    labels = _class_labels(class_labels, num_classes, num_images)
    indices = range(num_images) if indices is None else indices

    def batches() -> Iterator[torch.Tensor]:
        with tqdm(total=len(indices), desc="Generating", unit="image", disable=not progress, delay=1) as bar:
            for start in range(0, len(indices), batch_size):
                batch = list(indices[start : start + batch_size])
                noise = initial_noise(batch, image_shape, seed)
                yield _as_uint8(sample(noise, None if labels is None else labels[batch]), first=batch[0]).cpu()
                bar.update(len(batch))

    return batches()  # the arguments are checked before the first batch is asked for


def _sample(pipeline, num_inference_steps, noise, labels) -> torch.Tensor:
    """Images (B, C, H, W) in [0, 1], without the pipeline's own progress bar."""
    bar_config = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**bar_config, "disable": True})
    try:
        options = {} if labels is None else {"class_labels": labels}
        options |= {"num_inference_steps": num_inference_steps, "output_type": "pt"}
        return pipeline(batch_size=len(noise), latents=noise, **options).images
    finally:
        pipeline.set_progress_bar_config(**bar_config)


def _class_labels(class_labels, num_classes, num_images) -> torch.Tensor | None:
    """One label for each of `num_images` images, or None."""
    if isinstance(class_labels, str):
        _require(class_labels == "balanced", "class_labels", class_labels, '"balanced", labels or None')
        class_labels = None if num_classes is None else torch.arange(num_images) % num_classes
    if class_labels is None:
        return None
    labels = torch.as_tensor(class_labels)
    valid = labels.shape == (num_images,) and not labels.is_floating_point()
    _require(valid, "class_labels", tuple(labels.shape), f"{num_images} integers, one for each image")
    return labels


def _as_uint8(images: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Images as uint8 (B, C, H, W), from uint8 or from floats in [0, 1]; `first` is the number of the first one."""
    images = torch.as_tensor(images)
    _require(images.ndim == 4, "images", tuple(images.shape), "of shape (B, C, H, W)")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(f"`images` must be uint8 in 0..255 or floats in [0, 1], got {images.dtype}.")
    bad = torch.nonzero(images.flatten(1).isnan().any(1)).flatten().tolist()
    _require(not bad, "images", f"NaN in image {first + bad[0]}" if bad else None, "free of NaN")
    extremes = [] if images.numel() == 0 else [images.min().item(), images.max().item()]
    _require(all(0 <= x <= 1 for x in extremes), "images", extremes, "uint8, or floats in [0, 1]")
    return images.float().mul(255).round().to(torch.uint8)


class InceptionExtractor(torch.nn.Module):
    """The Inception network of FID and IS, ported from TensorFlow by torch-fidelity, called like a FeatureClassifier.

    It resizes as TensorFlow 1 did, which is part of the metric. Grey images are given as three equal channels.

    Args:
        weights_path (`str` or `os.PathLike`, *optional*): torch-fidelity's weight file, a state dict in PyTorch
            format; by default where torch-fidelity itself would have put it, in the cache of `torch.hub`.

    Raises:
        FileNotFoundError: if the file is absent; nothing is downloaded.
        ValueError: if the file holds other weights.
    """

    name = "inception-v3-compat"

    def __init__(self, weights_path: str | os.PathLike | None = None):
        super().__init__()
        path = Path(weights_path or Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE))
        if not path.is_file():
            raise FileNotFoundError(
                f"No Inception weights at `inception_weights`={str(path)!r}. Fetch {INCEPTION_FILE} from "
                f"{URL_INCEPTION_V3} and pass its path (`--inception_weights PATH`, `InceptionExtractor(PATH)`)."
            )
        # torch-fidelity would unpickle whatever the file holds: it is given a copy of the tensors alone.
        tensors_only = io.BytesIO()
        try:
            torch.save(torch.load(path, map_location="cpu", weights_only=True), tensors_only)
            tensors_only.seek(0)
            self.network = FeatureExtractorInceptionV3(
                self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=tensors_only
            )
        except Exception as error:
            raise ValueError(f"`inception_weights` must hold {INCEPTION_FILE}, got {str(path)!r}: {error}") from error

    def forward(self, images: torch.Tensor) -> SimpleNamespace:
        """Images (B, 1 or 3, H, W) in [-1, 1] -> `features` (B, 2048) and `logits` without bias (B, 1008)."""
        features, logits = self.network(to_uint8(images).expand(-1, 3, -1, -1))
        return SimpleNamespace(features=features, logits=logits)


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


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: Dowson and Landau 1982; Heusel et al. 2017 for FID.

    |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)). With sigma = L L^T the last trace is the sum of the
    singular values of L1^T L2, which stays exact for singular covariances. (torch-fidelity takes square roots of the
    eigenvalues of the unsymmetric product: slower, and there only half of the digits are good.)

    Args:
        mu1 (`np.ndarray`): mean of the first (D,).
        sigma1 (`np.ndarray`): its covariance (D, D), symmetric, positive semidefinite, of any rank.
        mu2 (`np.ndarray`): mean of the second (D,).
        sigma2 (`np.ndarray`): its covariance (D, D).

    Raises:
        ValueError: for shapes that differ, values that are not finite, or a matrix that is not a covariance.
    """
    return _frechet(mu1, sigma1, mu2, sigma2)[0]


def _frechet(mu1, sigma1, mu2, sigma2):
    """The distance, P (D, R) with d(distance)/d(sigma1) = I - P P^T, and the ranks of both covariances."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, dtype=np.float64) for x in (mu1, sigma1, mu2, sigma2))
    shapes = [x.shape for x in (mu1, sigma1, mu2, sigma2)]
    size = mu1.size
    matching = shapes == [(size,), (size, size)] * 2
    _require(matching, "mu1, sigma1, mu2, sigma2", shapes, "of shapes (D,), (D, D), (D,), (D, D)")
    for name, mu in (("mu1", mu1), ("mu2", mu2)):
        _require(np.isfinite(mu).all(), name, "NaN or infinity", "finite")
    factor1, factor2 = _factor(sigma1, "sigma1"), _factor(sigma2, "sigma2")
    _, s, v = np.linalg.svd(factor1.T @ factor2, full_matrices=False)
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * s.sum()
    keep = s > s.max(initial=0) * size * np.finfo(s.dtype).eps
    p = factor2 @ v[keep].T / np.sqrt(s[keep])
    return max(float(distance), 0.0), p, (factor1.shape[1], factor2.shape[1])


def _factor(sigma: np.ndarray, name: str) -> np.ndarray:
    """L (D, rank) with L L^T = sigma."""
    finite = np.isfinite(sigma).all()
    _require(finite and np.allclose(sigma, sigma.T), name, "another matrix", "finite and symmetric")
    values, vectors = np.linalg.eigh(sigma)
    tolerance = np.abs(values).max(initial=0) * len(values) * np.finfo(values.dtype).eps
    _require(values[0] >= -1e3 * tolerance, name, f"the eigenvalue {values[0]:g}", "positive semidefinite")
    keep = values > tolerance
    return vectors[:, keep] * np.sqrt(values[keep])


def _fd(features, mu2, sigma2, num_reference, label):
    """Frechet distance, and its influence function at each image: the first-order change an image makes."""
    statistics = fid_features_to_statistics(features.double())
    mu1, sigma1 = statistics["mu"], np.atleast_2d(statistics["sigma"])
    distance, p, ranks = _frechet(mu1, sigma1, mu2, sigma2)
    n, size = features.shape
    if min(n, num_reference) <= size:
        warnings.warn(
            f"{label} of {n} images against {num_reference}, fewer than its {size} feature dimensions can do with: "
            f"the covariances have rank {ranks[0]} and {ranks[1]}, and the value is biased.",
            stacklevel=5,
        )
    influence = []
    for chunk in features.split(4096):
        d = chunk.double().numpy() - mu1  # (B, D)
        influence.append(2 * d @ (mu1 - mu2) + (d**2).sum(1) - ((d @ p) ** 2).sum(1))
    return distance, np.concatenate(influence)


def _inception_score(logits, seed):
    """Inception Score (Salimans et al. 2016), mean over splits, and its influence function at each image."""
    value = isc_features_to_metric(logits, splits=10, rng_seed=seed)["inception_score_mean"]
    order = np.random.RandomState(seed).permutation(len(logits))
    log_p = logits[order].double().log_softmax(1)
    influence = []
    for log_p_split in log_p.tensor_split(10):
        p = log_p_split.exp()
        kl = torch.special.entr(p.mean(0)).sum() + (p * log_p_split).sum(1).mean()
        cross = (p * (log_p_split - p.mean(0).clamp(min=1e-300).log())).sum(1)
        influence.append(kl.exp() * (cross - kl))
    return value, torch.cat(influence).numpy()


def _kid(features, reference_features, seed):
    """Kernel Inception Distance (Binkowski et al. 2018), and its values on disjoint blocks of both sets."""
    features, reference_features = features.double(), reference_features.double()
    n = min(len(features), len(reference_features))
    size = min(1000, n)
    options = {"rng_seed": seed, "verbose": False}
    value = kid_features_to_metric(features, reference_features, kid_subset_size=size, **options)
    block = max(2, min(size, n // 20))
    shuffled = [x[np.random.RandomState(seed).permutation(len(x))] for x in (features, reference_features)]
    blocks = [
        kid_features_to_metric(
            *(x[start : start + block] for x in shuffled), kid_subsets=1, kid_subset_size=block, **options
        )["kernel_inception_distance_mean"]
        for start in range(0, n - block + 1, block)
    ]
    return value["kernel_inception_distance_mean"], np.array(blocks)


def _precision_recall(features, reference_features, device):
    """Improved precision and recall (Kynkaanniemi et al. 2019), with the hits that each is the mean of."""
    values = prc_features_to_metric(
        features.to(device), reference_features.to(device), save_cpu_ram=True, prc_batch_size=2048, verbose=False
    )
    counts = {"precision": len(features), "recall": len(reference_features)}
    return {key: (values[key], np.arange(n) < round(values[key] * n)) for key, n in counts.items()}


def _bootstrap_interval(value, contributions, seed, confidence=0.95, resamples=1000):
    """Percentile interval of value + (mean of resampled contributions - mean of contributions)."""
    rng = np.random.default_rng(seed)
    centred = np.asarray(contributions, dtype=np.float64) - np.mean(contributions)
    means = [centred[rng.integers(0, len(centred), len(centred))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(value + low), float(value + high)


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
            _require(metric in MIN_IMAGES, "metrics", metric, f"of {sorted(MIN_IMAGES)}")
        _require(len(metrics) > 0, "metrics", metrics, f"one or more of {sorted(MIN_IMAGES)}")
        _require_int("batch_size", batch_size, 1)
        _require_int("seed", seed, 0)
        if not isinstance(extractor, torch.nn.Module):
            raise TypeError(f"`extractor` must be a FeatureClassifier or InceptionExtractor, got {type(extractor)}.")
        attributes = ("__len__", "__getitems__", "image_shape", "name", "fingerprint")
        if reference is None:
            _require(set(metrics) == {"is"}, "reference", None, f"a data set for the metrics {metrics}")
        elif not all(hasattr(reference, attribute) for attribute in attributes):
            raise TypeError(f"`reference` must be an ImageData, with {attributes}, got {type(reference)}.")
        self.is_inception = isinstance(extractor, InceptionExtractor)
        backbone = getattr(getattr(extractor, "config", None), "backbone", None)
        self.name = extractor.name if self.is_inception else name or backbone
        _require(self.name, "name", name, "given for a classifier without `config.backbone`")
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
        _require_int("num_images", num_images, 1)
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
            progress=progress and self._is_main,
            **options,
        )
        return self._evaluate(images, seed)

    def _evaluate(self, images, seed):
        shape = None if self.reference is None else tuple(self.reference.image_shape)
        features, logits = self._extract([images] if isinstance(images, torch.Tensor) else images, shape)
        self._check_number(len(features))
        reference = self._reference_statistics() if set(self.metrics) != {"is"} else {}
        metrics = [self._compute(features, logits, reference, seed) if self._is_main else None]
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
            found["fd"] = _fd(features, mu, sigma, len(self.reference), self.label("fd"))
        if "is" in self.metrics:
            found["is"] = _inception_score(logits, seed32)
        if "kid" in self.metrics:
            found["kid"] = _kid(features, reference["features"], seed32)
        if {"precision", "recall"} & set(self.metrics):
            found |= _precision_recall(features, reference["features"], self._device)
        values = {}
        for metric in self.metrics:
            interval = _bootstrap_interval(*found[metric], seed)
            least = {"fd": 0.0, "is": 1.0}.get(metric, -math.inf)
            interval = tuple(max(bound, least) for bound in interval)
            values[metric] = MetricValue(self.label(metric), found[metric][0], interval)
        return values

    @torch.no_grad()
    def _extract(self, batches, shape):
        """Features (n, D) and logits (n, K) in float32 of the images of all processes, in rank order."""
        features, logits, count = [torch.empty(0, 0)], [torch.empty(0, 0)], 0
        for batch in batches:
            images = _as_uint8(batch, first=count)
            shape = shape or tuple(images.shape[1:])
            _require(images.shape[1:] == shape, "images", tuple(images.shape[1:]), f"{shape}, as {self._whose_shape}")
            for part in images.split(self.batch_size):
                output = self.extractor(to_model_range(part.to(self._device)))
                for name, rows in (("features", features), ("logits", logits)):
                    values = getattr(output, name).float().cpu()
                    _require(values.isfinite().all(), name, "NaN or infinity", f"finite, from {self.name}")
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
                if self._is_main:
                    _write_statistics(path, statistics)
            self._statistics = statistics
        return self._statistics

    def _reference_batches(self):
        share = self._share(len(self.reference))
        bar = {"desc": f"Reading {self.reference.name}", "disable": not self._is_main, "delay": 1}
        for start in tqdm(range(0, len(share), self.batch_size), unit="batch", **bar):
            yield self.reference.__getitems__(list(share[start : start + self.batch_size]))["images"]

    def _cache_path(self) -> Path | None:
        if self.cache_dir is False:
            return None
        readable = re.sub(r"[^\w.-]+", "-", f"{self.reference.name}-{len(self.reference)}-{self.name}")
        return Path(self.cache_dir, f"{readable}-{self.reference_key[:16]}.safetensors")

    def _check_number(self, num_images):
        sizes = {"num_images": num_images}
        if self.reference is not None and set(self.metrics) != {"is"}:
            sizes["len(reference)"] = len(self.reference)
        for field, size in sizes.items():
            for metric in self.metrics:
                _require(size >= MIN_IMAGES[metric], field, size, f"at least {MIN_IMAGES[metric]} for {metric!r}")

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
    def _is_main(self):
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
    _require(found == num_images, "reference", f"statistics of {found} images in {path}", f"of {num_images} images")
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


def _require_int(name, value, least) -> None:
    integer = isinstance(value, int) and not isinstance(value, bool)
    _require(integer and value >= least, name, value, f"an integer of at least {least}")


def _require(condition, name, value, allowed) -> None:
    if not condition:
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")
