"""Means and covariances of the features of a reference data set, as files."""

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffusers_rcfd.saving import write_whole
from diffusers_rcfd.validation import require

# What a file of torch-fidelity holds beside tensors: it pickles NumPy's arrays.
_NUMPY_TYPES = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype("f4")), type(np.dtype("f8"))]


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of the features of a set of images.

    Args:
        mu (`np.ndarray` of shape (D,)): the mean, float64.
        sigma (`np.ndarray` of shape (D, D)): the covariance, float64.
        num_images (`int`, *optional*): the images that they were computed from, where the file says so.
    """

    mu: np.ndarray
    sigma: np.ndarray
    num_images: int | None = None


def read_statistics(path: str | os.PathLike) -> FeatureStatistics:
    """Read the statistics of a reference data set.

    Args:
        path (`str` or `os.PathLike`): a `.npz` with "mu" and "sigma", as pytorch-fid, EDM and ADM publish them; else
            a file that torch-fidelity keeps in its cache (`...-stat-fid-...`). No pickled code is run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it does not hold a mean (D,) and a covariance (D, D), all finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`reference_statistics` must be a file, got {str(path)!r}.")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                values = {key: arrays[key] for key in ("mu", "sigma", "num_images") if key in arrays}
        else:
            with torch.serialization.safe_globals(_NUMPY_TYPES):
                values = dict(torch.load(path, map_location="cpu", weights_only=True))
        mu, sigma = (np.asarray(values[key], dtype=np.float64) for key in ("mu", "sigma"))
    except Exception as error:
        raise ValueError(f"`reference_statistics` must hold 'mu' and 'sigma', got {str(path)!r}: {error}") from error
    shapes = (mu.shape, sigma.shape)
    require(shapes == ((mu.size,), (mu.size, mu.size)), "reference_statistics", shapes, "of shapes (D,) and (D, D)")
    finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
    require(finite, "reference_statistics", "NaN or infinity", "finite")
    num_images = values.get("num_images")
    return FeatureStatistics(mu, sigma, None if num_images is None else int(num_images))


def write_statistics(statistics: FeatureStatistics, path: str | os.PathLike) -> None:
    """Write statistics for others to compare with.

    Args:
        statistics (`FeatureStatistics`): what to write.
        path (`str` or `os.PathLike`): a name that ends in `.npz` for the common form, in `.pt` for torch-fidelity's.

    Raises:
        ValueError: for a name with another ending.
    """
    path = Path(path)
    require(path.suffix in (".npz", ".pt"), "path", str(path), "a name that ends in '.npz' or '.pt'")
    written = io.BytesIO()
    if path.suffix == ".npz":
        number = {} if statistics.num_images is None else {"num_images": statistics.num_images}
        np.savez(written, mu=statistics.mu, sigma=statistics.sigma, **number)
    else:
        torch.save({"mu": statistics.mu, "sigma": statistics.sigma}, written)
    write_whole(path, written.getvalue())


def read_cache(path: Path | None, num_images: int, need_features: bool) -> dict[str, torch.Tensor] | None:
    """Read what `write_cache` kept of a reference data set.

    Args:
        path (`Path` or None): the file; None for no cache.
        num_images (`int`): images of the data set.
        need_features (`bool`): whether mean and covariance are not enough.

    Returns:
        `dict` or None: "mu" (D,), "sigma" (D, D), "num_images" and perhaps "features" (N, D); None where the file is
        absent, unreadable or holds no features that are needed.

    Raises:
        ValueError: if the file is of another number of images.
    """
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


def write_cache(path: Path | None, statistics: dict[str, torch.Tensor]) -> None:
    """Keep the statistics of a reference data set; a folder that cannot be written gives a warning."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # jobs beside this one keep the same file
        save_file(statistics, partial)
        os.replace(partial, path)
    except OSError as error:
        warnings.warn(f"The statistics of the reference could not be cached in {path}: {error}", stacklevel=2)
