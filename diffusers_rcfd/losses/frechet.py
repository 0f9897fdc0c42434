"""The Frechet distance between generated and real images as a loss (Yang et al. 2026, arXiv 2604.28190).

In a space phi with moments mu, S of the student and mu_r, S_r of the real images,

    L = |mu - mu_r|^2 + tr(S + S_r - 2 (S_r^(1/2) S S_r^(1/2))^(1/2)).

A batch is too small to estimate mu and S, so it is one part of a memory: m1 = b m1' + (1 - b) mean phi(x), and m2
likewise for phi(x) phi(x)^T, with the old moments constant. The gradient reaches the student through the batch's share
alone, and is divided by this share to keep its scale: then it is the gradient of the batch mean of

    h(x) = 2 (mu - mu_r) . phi(x) + (phi(x) - mu)^T A (phi(x) - mu),   A = dL/dS,

in which mu, mu_r and A are constants. This is exact for accumulated batches and for several processes without more:
each part takes the mean of h over its own images, and the parts are averaged.

Use two spaces or more, one of them pixels: a student cheats one space in the directions that this space does not see.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import distributed as dist

from diffusers_rcfd.validation import is_number, require, require_count

Space = Callable[[torch.Tensor], torch.Tensor]  # images (B, C, H, W) in [-1, 1] -> (B, D)

# In the gradient, eigenvalues of S_r^(1/2) S S_r^(1/2) are at least this share of tr(S_r)^2: it stays finite where the
# student has no variance.
FLOOR = 1e-12


@dataclass(frozen=True)
class Moments:
    """First and second moments of the features of images, in float64.

    Args:
        first (`torch.Tensor` of shape (D,)): mean of phi.
        second (`torch.Tensor` of shape (D, D)): mean of phi phi^T.
        num_images (`int`, *optional*): the images that they are the moments of; None for a running average.
    """

    first: torch.Tensor
    second: torch.Tensor
    num_images: int | None = None

    @property
    def covariance(self) -> torch.Tensor:
        """S (D, D), with the factor 1 / n."""
        return self.second - torch.outer(self.first, self.first)

    @cached_property
    def factor(self) -> torch.Tensor:
        """L (D, R) with L L^T = S, where R is the rank of S; the largest directions come last."""
        values, vectors = torch.linalg.eigh(self.covariance)
        tolerance = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
        keep = values > tolerance
        return vectors[:, keep] * values[keep].sqrt()

    def mix(self, other: "Moments", share: float) -> "Moments":
        """(1 - share) of these moments and `share` of others."""
        return Moments(self.first.lerp(other.first, share), self.second.lerp(other.second, share))


def compute_moments(features: torch.Tensor, space: str = "features") -> Moments:
    """Moments of the images of all processes; no gradient passes, for `frechet` brings its own.

    Args:
        features (`torch.Tensor` of shape (B, D)): of the images of this process.
        space (`str`, defaults to `"features"`): what messages call the features.

    Raises:
        ValueError: for features of another shape, of no images, or that are not finite.
    """
    require(features.ndim == 2 and features.numel() > 0, space, tuple(features.shape), "features of shape (B, D)")
    require(bool(features.isfinite().all()), space, "NaN or infinity", "finite features")
    features = features.detach().double()
    sums = torch.cat([features.sum(0), features.new_tensor([len(features)])])  # (D + 1,)
    products = features.T @ features  # (D, D)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
        dist.all_reduce(products)
    count = sums[-1]
    return Moments(sums[:-1] / count, products / count, int(count))


def warn_of_low_rank(real: Moments, space: str = "features") -> None:
    """Warn where there are too few images to estimate a covariance of this size."""
    size = len(real.first)
    if real.num_images <= size:
        warnings.warn(
            f"`{space}` has {size} dimensions and only {real.num_images} real images: their covariance has rank "
            f"{real.factor.shape[1]}. Use more images or fewer dimensions, such as principal components.",
            stacklevel=2,
        )


def distance_and_gradient(student: Moments, real: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """L, and P (D, R) with dL/dS = A = I - P P^T.

    With S_r = L L^T the trace of the root is the sum of the roots of the eigenvalues of L^T S L, a symmetric matrix
    whose size is the rank of S_r. One eigendecomposition gives the value and the gradient; singular S and S_r are
    allowed.
    """
    factor = real.factor
    covariance = student.covariance
    values, vectors = torch.linalg.eigh(factor.T @ covariance @ factor)  # (R,), (R, R)
    shift = student.first - real.first
    trace_of_root = values.clamp(min=0).sqrt().sum()
    distance = shift @ shift + covariance.trace() + factor.square().sum() - 2 * trace_of_root
    floored = torch.maximum(values, FLOOR * factor.square().sum().square())
    return distance.clamp(min=0), factor @ (vectors * floored**-0.25)


def frechet(features: torch.Tensor, student: Moments, real: Moments) -> torch.Tensor:
    """The Frechet distance, with its gradient through a batch of images; a scalar in float64.

    The value is that of the moments `student`. The gradient in `features` is that of the distance, divided by the
    share that the batch has in the moments.

    Args:
        features (`torch.Tensor` of shape (B, D)): of the student's images, differentiable.
        student (`Moments`): running moments that include the batch: all of it, where `features` are one of several
            equal parts (of processes, or of an accumulated batch). The mean of the gradients of all parts is the
            gradient of the whole batch.
        real (`Moments`): of the real images.
    """
    distance, p = distance_and_gradient(student, real)
    deviation = features.double() - student.first  # (B, D); autocast leaves float64 alone
    shift = student.first - real.first
    influence = 2 * deviation @ shift + deviation.square().sum(1) - (deviation @ p).square().sum(1)  # (B,)
    through_the_batch = influence.mean()
    return distance + through_the_batch - through_the_batch.detach()


class FrechetMoments:
    """The moments of one space: those of the real images, and the running ones of the student.

    They start from images of the student, not from zero. `frechet(features, memory.include(features), memory.real)` is
    the loss of a batch; `update` then takes the batch in for good, once for an optimizer step.

    Args:
        real (`Moments`): of the real images.
        student (`Moments`): of images that the student draws before it is trained.
        decay (`float`, defaults to 0.98): b, the share of the old moments, in [0, 1); 0 has no memory.
        space (`str`, defaults to `"features"`): what messages call the features.

    Raises:
        ValueError: for a decay out of its range, or moments of different sizes.
    """

    def __init__(self, real: Moments, student: Moments, *, decay: float = 0.98, space: str = "features"):
        require(is_number(decay) and 0 <= decay < 1, "decay", decay, "in [0, 1)")
        sizes = (len(real.first), len(student.first))
        require(sizes[0] == sizes[1], space, sizes, "features of one size")
        warn_of_low_rank(real, space)
        self.real = real
        self.student = student
        self.decay = decay
        self.space = space

    def include(self, features: torch.Tensor) -> Moments:
        """The student's moments with a batch taken in; nothing is changed.

        Args:
            features (`torch.Tensor` of shape (B, D)): of all the images of an optimizer step on this process, those of
                accumulated batches together.
        """
        return self.student.mix(compute_moments(features, self.space), 1 - self.decay)

    def update(self, features: torch.Tensor) -> None:
        """Take a batch in; see `include`."""
        self.student = self.include(features)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The student's moments; those of the real images are computed again."""
        return {"first": self.student.first, "second": self.student.second}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Go on from moments that `state_dict` gave.

        Raises:
            ValueError: for moments of another size.
        """
        first = state_dict["first"]
        require(first.shape == self.real.first.shape, self.space, len(first), f"of {len(self.real.first)} dimensions")
        like = self.real.first
        self.student = Moments(first.to(like), state_dict["second"].to(like))


class FrechetQueue(FrechetMoments):
    """As `FrechetMoments`, with the moments of the last images in place of a running average.

    Args:
        real (`Moments`): of the real images.
        features (`torch.Tensor` of shape (Q, D)): of images that the student draws before it is trained, the share of
            this process. The queue keeps its length Q.
        space (`str`, defaults to `"features"`): what messages call the features.
    """

    def __init__(self, real: Moments, features: torch.Tensor, *, space: str = "features"):
        super().__init__(real, compute_moments(features, space), decay=0, space=space)
        self.queue = features.detach()

    def include(self, features: torch.Tensor) -> Moments:
        """The moments of the queue with a batch in place of the oldest images; nothing is changed."""
        length = len(self.queue)
        require(len(features) <= length, self.space, len(features), f"a batch of at most {length}, as the queue")
        new, old = compute_moments(features, self.space), compute_moments(self.queue[: len(features)])
        share = len(features) / length
        return Moments(
            self.student.first + share * (new.first - old.first),
            self.student.second + share * (new.second - old.second),
        )

    def update(self, features: torch.Tensor) -> None:
        """Put a batch into the queue in place of the oldest images."""
        super().update(features)
        self.queue = torch.cat([self.queue[len(features) :], features.detach().to(self.queue)])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The student's moments and the queue, which is that of this process."""
        return super().state_dict() | {"queue": self.queue}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self.queue = state_dict["queue"].to(self.queue)


def pixels(images: torch.Tensor) -> torch.Tensor:
    """The space of all pixels, in [0, 1] and float64; (B, C, H, W) to (B, C H W)."""
    return (images.double() / 2 + 0.5).flatten(1)


class PrincipalComponents:
    """The pixels in the directions in which real images vary most, for data of more pixels than images can fill.

    Args:
        real_images (`torch.Tensor` of shape (N, C, H, W)): in [-1, 1].
        num_components (`int`): D, at least 1, at most the rank of the pixels' covariance.

    Raises:
        ValueError: for more components than the real images have.
    """

    def __init__(self, real_images: torch.Tensor, num_components: int):
        require_count("num_components", num_components, 1)
        factor = compute_moments(pixels(real_images), "pixels").factor  # (C H W, R)
        rank = factor.shape[1]
        require(num_components <= rank, "num_components", num_components, f"at most {rank}, the rank of the pixels")
        largest = factor[:, rank - num_components :].flip(1)
        self.directions = largest / largest.norm(dim=0)  # (C H W, D)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The components of images (B, C, H, W) in [-1, 1]; (B, D)."""
        return pixels(images) @ self.directions.to(images.device)  # (B, D)


def build_space(name: str, classifier: Any = None, real_images: torch.Tensor | None = None) -> Space:
    """The space that an option names.

    Args:
        name (`str`): "features", of the classifier; "spatial:N", the channel means of its stage N; "pixels"; or
            "components:D", the D principal components of the real images' pixels.
        classifier (`FeatureClassifier`, *optional*): for "features" and "spatial".
        real_images (`torch.Tensor`, *optional*): (N, C, H, W) in [-1, 1], for "components".

    Raises:
        ValueError: for another name, or one whose classifier or images are not given.
    """
    kind, _, number = name.partition(":")
    known = number.lstrip("-").isdecimal() if kind in ("spatial", "components") else name in ("features", "pixels")
    require(known, "spaces", name, "'features', 'spatial:N', 'pixels' or 'components:D'")
    if kind == "pixels":
        return pixels
    if kind == "components":
        require(real_images is not None, "real_images", None, f"given for the space {name!r}")
        return PrincipalComponents(real_images, int(number))
    require(classifier is not None, "classifier", None, f"given for the space {name!r}")
    if kind == "features":
        return lambda images: classifier(images).features
    return lambda images: classifier.spatial_features(images, [int(number)])[0].flatten(2).mean(2)


class FrechetLoss:
    """The weighted sum of the Frechet distances in several spaces.

    Args:
        spaces (`Mapping[str, Space]`): by name, at least one.
        weights (`Mapping[str, float]`): of each space, at least 0, one of them above 0; a space of weight 0 is
            measured only.
        real_images (`torch.Tensor` of shape (N, C, H, W)): in [-1, 1].
        student_images (`torch.Tensor` of shape (M, C, H, W)): that the student draws before it is trained; of several
            processes each gives its own share of the real and of these.
        decay (`float`, defaults to 0.98): see `FrechetMoments`.
        queue (`bool`, defaults to False): keep the moments of the last M images, see `FrechetQueue`, in place of a
            running average.
        batch_size (`int`, defaults to 256): images at a time, while the first moments are computed.

    Raises:
        ValueError: for weights of other spaces, below 0 or all 0, for no images, or features that are not finite.

    Example:
        ```python
        spaces = {name: build_space(name, classifier, real) for name in ("features", "pixels")}
        loss = FrechetLoss(spaces, {"features": 1.0, "pixels": 10.0}, real, draw(2048))
        for noise in batches:
            features = loss.features(student(noise))
            loss(features).backward()
            optimizer.step()
            loss.update(features)
        ```
        Of an accumulated batch, each part's loss is `loss(features, loss.include(features_of_all_parts))`.
    """

    def __init__(
        self,
        spaces: Mapping[str, Space],
        weights: Mapping[str, float],
        real_images: torch.Tensor,
        student_images: torch.Tensor,
        *,
        decay: float = 0.98,
        queue: bool = False,
        batch_size: int = 256,
    ):
        require(bool(spaces) and spaces.keys() == weights.keys(), "weights", dict(weights), f"for {sorted(spaces)}")
        positive = all(is_number(weight) and weight >= 0 for weight in weights.values()) and any(weights.values())
        require(positive, "weights", dict(weights), "at least 0, and one of them above 0")
        for name, images in (("real_images", real_images), ("student_images", student_images)):
            require(len(images) > 0, name, "none", "one image or more")
        self.spaces = dict(spaces)
        self.weights = dict(weights)
        self.moments = {}
        for name, space in self.spaces.items():
            real = compute_moments(_extract(space, real_images, batch_size), name)
            student = _extract(space, student_images, batch_size)
            self.moments[name] = (
                FrechetQueue(real, student, space=name)
                if queue
                else FrechetMoments(real, compute_moments(student, name), decay=decay, space=name)
            )

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each space shows of images (B, C, H, W) in [-1, 1]: (B, D) by name, differentiable."""
        return {name: space(images) for name, space in self.spaces.items()}

    def include(self, features: Mapping[str, torch.Tensor]) -> dict[str, Moments]:
        """The student's moments with a batch taken in, by space; see `FrechetMoments.include`."""
        return {name: moments.include(features[name]) for name, moments in self.moments.items()}

    def update(self, features: Mapping[str, torch.Tensor]) -> None:
        """Take the features of all the images of an optimizer step on this process into the student's moments."""
        for name, moments in self.moments.items():
            moments.update(features[name])

    def distances(
        self, features: Mapping[str, torch.Tensor], student: Mapping[str, Moments] | None = None
    ) -> dict[str, torch.Tensor]:
        """The distance in each space, with its gradient through a batch or a part of it; see `frechet`.

        Args:
            features (`Mapping[str, torch.Tensor]`): of the batch or of the part.
            student (`Mapping[str, Moments]`, *optional*): `include` of the whole batch, for a part.
        """
        student = self.include(features) if student is None else student
        return {name: frechet(features[name], student[name], self.moments[name].real) for name in self.moments}

    def __call__(
        self, features: Mapping[str, torch.Tensor], student: Mapping[str, Moments] | None = None
    ) -> torch.Tensor:
        """The weighted sum of `distances`."""
        distances = self.distances(features, student)
        return sum(self.weights[name] * distance for name, distance in distances.items() if self.weights[name])

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """The student's moments by space."""
        return {name: moments.state_dict() for name, moments in self.moments.items()}

    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: for moments of other spaces or sizes.
        """
        require(state_dict.keys() == self.moments.keys(), "spaces", sorted(state_dict), f"{sorted(self.moments)}")
        for name, moments in self.moments.items():
            moments.load_state_dict(state_dict[name])


@torch.no_grad()
def _extract(space: Space, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    return torch.cat([space(part) for part in images.split(batch_size)])
