"""Distances between sets of features, each with the contributions that a bootstrap resamples. Pure functions.

torch-fidelity is imported when a metric is first computed.
"""

import warnings

import numpy as np
import torch

from diffusers_rcfd.validation import require


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: Dowson and Landau 1982; Heusel et al. 2017 for FID.

    |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)). With sigma = L L^T the last trace is the sum of the
    singular values of L1^T L2, which stays exact for singular covariances, and which has a gradient. (torch-fidelity
    takes roots of the eigenvalues of the unsymmetric product: where those are 0 in truth, their rounding errors of
    1e-16 become errors of 1e-8 each.)

    Args:
        mu1 (`np.ndarray`): mean of the first (D,).
        sigma1 (`np.ndarray`): its covariance (D, D), symmetric, positive semidefinite, of any rank.
        mu2 (`np.ndarray`): mean of the second (D,).
        sigma2 (`np.ndarray`): its covariance (D, D).

    Raises:
        ValueError: for shapes that differ, values that are not finite, or a matrix that is not a covariance.
    """
    return frechet_and_gradient(mu1, sigma1, mu2, sigma2)[0]


def frechet_and_gradient(mu1, sigma1, mu2, sigma2):
    """The distance, P (D, R) with d(distance)/d(sigma1) = I - P P^T, and the ranks of both covariances."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, dtype=np.float64) for x in (mu1, sigma1, mu2, sigma2))
    shapes = [x.shape for x in (mu1, sigma1, mu2, sigma2)]
    size = mu1.size
    matching = shapes == [(size,), (size, size)] * 2
    require(matching, "mu1, sigma1, mu2, sigma2", shapes, "of shapes (D,), (D, D), (D,), (D, D)")
    for name, mu in (("mu1", mu1), ("mu2", mu2)):
        require(np.isfinite(mu).all(), name, "NaN or infinity", "finite")
    factor1, factor2 = _factor(sigma1, "sigma1"), _factor(sigma2, "sigma2")
    _, s, v = np.linalg.svd(factor1.T @ factor2, full_matrices=False)
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * s.sum()
    keep = s > s.max(initial=0) * size * np.finfo(s.dtype).eps
    p = factor2 @ v[keep].T / np.sqrt(s[keep])
    return max(float(distance), 0.0), p, (factor1.shape[1], factor2.shape[1])


def _factor(sigma: np.ndarray, name: str) -> np.ndarray:
    """L (D, rank) with L L^T = sigma."""
    finite = np.isfinite(sigma).all()
    require(finite and np.allclose(sigma, sigma.T), name, "another matrix", "finite and symmetric")
    values, vectors = np.linalg.eigh(sigma)
    tolerance = np.abs(values).max(initial=0) * len(values) * np.finfo(values.dtype).eps
    require(values[0] >= -1e3 * tolerance, name, f"the eigenvalue {values[0]:g}", "positive semidefinite")
    keep = values > tolerance
    return vectors[:, keep] * np.sqrt(values[keep])


def mean_and_covariance(features):
    """Mean (D,) and covariance (D, D) of features (n, D), float64."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    statistics = fid_features_to_statistics(features.double())
    return statistics["mu"], np.atleast_2d(statistics["sigma"])


def fd_with_influence(features, mu2, sigma2, num_reference, label):
    """Frechet distance, and its influence function at each image: the first-order change an image makes.

    `num_reference` is the number of reference images, or None where it is not known.
    """
    mu1, sigma1 = mean_and_covariance(features)
    distance, p, ranks = frechet_and_gradient(mu1, sigma1, mu2, sigma2)
    n, size = features.shape
    if n <= size or (num_reference is not None and num_reference <= size):
        warnings.warn(
            f"{label} of {n} images against {num_reference}, too few for its {size} feature dimensions: "
            f"the covariances have rank {ranks[0]} and {ranks[1]}, and the value is biased.",
            stacklevel=5,
        )
    influence = []
    for chunk in features.split(4096):
        d = chunk.double().numpy() - mu1  # (B, D)
        influence.append(2 * d @ (mu1 - mu2) + (d**2).sum(1) - ((d @ p) ** 2).sum(1))
    return distance, np.concatenate(influence)


def inception_score_with_influence(logits, seed):
    """Inception Score (Salimans et al. 2016), mean over splits, and its influence function at each image."""
    from torch_fidelity.metric_isc import isc_features_to_metric

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


def kid_with_blocks(features, reference_features, seed):
    """Kernel Inception Distance (Binkowski et al. 2018), and its values on disjoint blocks of both sets."""
    from torch_fidelity.metric_kid import kid_features_to_metric

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


def precision_recall_with_hits(features, reference_features, device):
    """Improved precision and recall (Kynkaanniemi et al. 2019), with the hits that each is the mean of."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    values = prc_features_to_metric(
        features.to(device), reference_features.to(device), save_cpu_ram=True, prc_batch_size=2048, verbose=False
    )
    counts = {"precision": len(features), "recall": len(reference_features)}
    return {key: (values[key], np.arange(n) < round(values[key] * n)) for key, n in counts.items()}


def bootstrap_interval(value, contributions, seed, confidence=0.95, resamples=1000):
    """Percentile interval of value + (mean of resampled contributions - mean of contributions)."""
    rng = np.random.default_rng(seed)
    centred = np.asarray(contributions, dtype=np.float64) - np.mean(contributions)
    means = [centred[rng.integers(0, len(centred), len(centred))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(value + low), float(value + high)
