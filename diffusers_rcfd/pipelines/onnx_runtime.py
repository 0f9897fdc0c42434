"""Sampling on a CPU with the network in ONNX Runtime, which takes a fraction of the time for few images."""

import copy
import importlib.util
import io
import warnings

import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_rcfd.models.denoiser import call_unet
from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline
from diffusers_rcfd.validation import require_count

PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def to_onnx_runtime(pipeline: RCFDPipeline, num_threads: int | None = None) -> RCFDPipeline:
    """The same pipeline with the forward pass of its network in ONNX Runtime, for sampling on a CPU.

    Only the network's computation is replaced: calls, seeds, schedules and saving stay as they are, and images agree
    to float32 rounding. The network is exported once, for any batch size; the given pipeline is left as it is. The
    weights are those of this moment, and no gradient flows.

    Args:
        pipeline (`RCFDPipeline`): in float32 on the CPU.
        num_threads (`int`, *optional*): threads of ONNX Runtime; `torch.get_num_threads()` by default.

    Raises:
        ImportError: where onnx, onnxruntime or onnxscript is missing (`pip install diffusers_rcfd[onnx]`).
        ValueError: for a pipeline in another number type or on another device, or `num_threads` under 1.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX Runtime needs {', '.join(missing)}: pip install diffusers_rcfd[onnx].")
    check_float32_on_cpu("pipeline", next(pipeline.unet.parameters()))
    num_threads = torch.get_num_threads() if num_threads is None else num_threads
    num_threads = require_count("num_threads", num_threads, 1)
    unet = copy.copy(pipeline.unet)  # the same weights, a forward pass of its own
    unet.forward = _Session(getattr(pipeline.unet, "_orig_mod", pipeline.unet), num_threads)
    faster = RCFDPipeline(unet, pipeline.scheduler)
    faster.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return faster


class _Session:
    """A `UNet2DModel`'s forward pass, exported and run by ONNX Runtime."""

    def __init__(self, unet: UNet2DModel, num_threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        self.session = onnxruntime.InferenceSession(export_network(unet), options, ["CPUExecutionProvider"])
        self.names = [given.name for given in self.session.get_inputs()]

    def __call__(self, sample, timestep, class_labels=None, return_dict=True):
        check_float32_on_cpu("sample", sample)  # the pipeline may have been moved since
        timesteps = torch.as_tensor(timestep).to(torch.int64).expand(len(sample))
        given = [sample, timesteps] if class_labels is None else [sample, timesteps, class_labels]
        feed = {name: value.detach().numpy() for name, value in zip(self.names, given, strict=True)}
        output = torch.from_numpy(self.session.run(None, feed)[0])
        return UNet2DOutput(sample=output) if return_dict else (output,)


def check_float32_on_cpu(name: str, tensor: torch.Tensor) -> None:
    """Raise a `ValueError` that names what is of another number type or on another device."""
    if (tensor.dtype, tensor.device.type) != (torch.float32, "cpu"):
        raise ValueError(f"`{name}` must be in float32 on the CPU, got {tensor.dtype} on {tensor.device}.")


def export_network(unet: UNet2DModel) -> bytes:
    """The network as an ONNX model: z (B, C, H, W), t (B,) and, where it has class embeddings, labels (B,).

    Args:
        unet (`UNet2DModel`): in float32 on the CPU; exported in eval mode.
    """
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    given = {"z": torch.zeros(2, unet.config.in_channels, height, width), "t": torch.zeros(2, dtype=torch.int64)}
    if unet.config.num_class_embeds is not None:
        given["labels"] = torch.zeros(2, dtype=torch.int64)
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter, about its own code
        program = torch.onnx.export(
            _Prediction(unet).eval(),
            tuple(given.values()),
            input_names=list(given),
            dynamic_shapes=tuple({0: batch} for _ in given),
            dynamo=True,
            verbose=False,
        )
    file = io.BytesIO()
    program.save(file)
    return file.getvalue()


class _Prediction(torch.nn.Module):
    """A network whose output is a tensor, not a dictionary."""

    def __init__(self, unet: UNet2DModel):
        super().__init__()
        self.unet = copy.deepcopy(unet)  # which eval mode is set on

    def forward(self, z, t, labels=None):
        return call_unet(self.unet, z, t, labels)
