"""The one place where a diffusion network is called: (z_t, t, class) -> x0."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import UNet2DModel


def call_unet(network: torch.nn.Module, z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Call a `UNet2DModel`: z (B, C, H, W), t (B,) or a scalar, labels (B,) or None; returns (B, C, H, W)."""
    return network(z, t, labels, return_dict=False)[0]


# Each kind of network and how it is called. A new kind is one function and one row.
NETWORK_CALLS = {UNet2DModel: call_unet}


def unwrap(network: torch.nn.Module) -> torch.nn.Module:
    """Return the network inside the wrappers of `torch.compile` and of data-parallel training.

    Raises:
        TypeError: for a network of a kind that `NETWORK_CALLS` does not have.
    """
    inner = network
    while not isinstance(inner, tuple(NETWORK_CALLS)):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            allowed = " or ".join(kind.__name__ for kind in NETWORK_CALLS)
            raise TypeError(f"`unet` must be a {allowed}, got {type(network).__name__}.")
    return inner


class Denoiser:
    """A network with its noise schedule, as a function (z_t, t, labels) -> x0.

    It owns everything between a noisy image and the denoised one: the call of the network, autocast and casts, the
    parametrisation, and the rows that class and step count have in the table of class embeddings. It holds no weights
    of its own and costs nothing to build.

    Args:
        network (`UNet2DModel`): the network, as it is or wrapped by `torch.compile` or Accelerate.
        scheduler (`RCFDScheduler`): its schedule, and what it predicts.
        autocast (`Callable`, *optional*): makes the context that the network is called in, such as
            `Accelerator.autocast`. Without it, z_t is cast to the type of the weights.
        num_inference_steps (`int`, *optional*): which of its step counts a network of several (SFD-v) is called as;
            defaults to the scheduler's own.

    Raises:
        TypeError: for a network of an unknown kind.

    Example:
    ```python
    denoiser = Denoiser(pipeline.unet, pipeline.scheduler)
    x0 = denoiser(z_t, t)  # z_t (B, C, H, W), t (B,)
    ```
    """

    def __init__(
        self,
        network: torch.nn.Module,
        scheduler,
        autocast: Callable[[], AbstractContextManager] | None = None,
        num_inference_steps: int | None = None,
    ):
        plain = unwrap(network)
        self.network = network
        self.scheduler = scheduler
        self.config = plain.config
        self.autocast = autocast or nullcontext
        self.dtype = None if autocast else weight_dtype(plain)
        self.num_inference_steps = num_inference_steps
        self._call = next(call for kind, call in NETWORK_CALLS.items() if isinstance(plain, kind))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        size = self.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.config.in_channels, height, width

    @property
    def num_classes(self) -> int | None:
        """Classes of a class-conditional network, else None; step counts that share the embeddings do not count."""
        embeddings, counts = self.config.num_class_embeds, len(self.scheduler.trained_steps)
        if embeddings is None or embeddings == counts > 1:
            return None
        return embeddings // max(counts, 1)

    def embedding_rows(self, labels: torch.Tensor | None, z: torch.Tensor) -> torch.Tensor | None:
        """Rows (B,) of the class embeddings for classes (B,): all classes of the first step count, then the second.

        Args:
            labels (`torch.Tensor`, *optional*): classes (B,); ignored by an unconditional network.
            z (`torch.Tensor`): gives batch size B and device.
        """
        num_classes, counts = self.num_classes, self.scheduler.trained_steps
        if num_classes is None:
            labels = None
        if len(counts) < 2:
            return labels
        if labels is None:
            labels = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        steps = self.scheduler.num_inference_steps if self.num_inference_steps is None else self.num_inference_steps
        return labels + counts.index(steps) * (num_classes or 1)

    def predict(self, z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """What the network itself predicts (x0, eps or v), (B, C, H, W), in the type of z, at least float32.

        Args:
            z (`torch.Tensor`): noisy images z_t (B, C, H, W).
            t (`torch.Tensor`): indices of the schedule, (B,) or a scalar.
            labels (`torch.Tensor`, *optional*): classes (B,) of a class-conditional network.
        """
        rows = self.embedding_rows(labels, z)
        z_in = self.scheduler.scale_model_input(z, t)
        with self.autocast():
            output = self._call(self.network, z_in if self.dtype is None else z_in.to(self.dtype), t, rows)
        return output.to(torch.promote_types(z.dtype, torch.float32))

    def __call__(self, z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The denoised image x0 (B, C, H, W), unclipped; arguments as in `predict`."""
        return self.scheduler.predict_x0(self.predict(z, t, labels), z, t)

    def at_index(self, x: torch.Tensor, k: int, labels: torch.Tensor | None = None) -> torch.Tensor:
        """x0 at index k of the schedule and x = z / alpha, the variance-exploding form of z."""
        t = torch.full((len(x),), k, device=x.device)
        return self(self.scheduler.alpha[k].item() * x, t, labels)


def weight_dtype(network: torch.nn.Module) -> torch.dtype:
    """The number type that a network computes in; Diffusers' own `dtype` takes as long as a small network.

    Weights stored in 8 bits are computed with in more bits.
    """
    weight = next(network.parameters())
    return network.dtype if weight.dtype.itemsize == 1 else weight.dtype
