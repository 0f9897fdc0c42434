"""Means to be faster, each timed in pairs with and without, beside what was predicted and what was decided."""

import copy
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers.training_utils import EMAModel
from paired import DEVICE, PRESETS, components, line, pipeline_of, ratio, row
from torch._dynamo.utils import counters
from torch.fx.experimental.optimization import fuse

from diffusers_rcfd import CFDDistillationConfig, to_onnx_runtime
from diffusers_rcfd.trainers.fast_networks import frozen
from diffusers_rcfd.trainers.optimization import average_step

TRAINING = (("digits", 64), ("fashion-mnist", 16))

NOT_MEASURED = """Not measured, for want of a GPU: CUDA graphs for few-step sampling, pinned and prefetched images,
the share of a card's matrix rate. Not tried, as there is nothing to gain: teacher and student share inputs but no
weights, so one pass cannot serve both; each image is resized for the classifier once already; the noise is new in
every step, so no teacher target comes twice."""


@dataclass
class Mean:
    """Something that might be faster: `pairs` yields (setting, function with it, function without it)."""

    name: str
    prediction: str
    decision: str
    pairs: Callable


def means(pairs):
    for mean in MEANS:
        for setting, with_it, without in mean.pairs():
            yield row(mean.name, setting, ratio(with_it, without, pairs, 0.2), None)


def means_table(rows):
    table = ["| mean | setting | median | quartiles |", "|---|---|---:|---:|"]
    table += ["|".join(line(found).split("|")[:5]) + "|" for found in rows]
    texts = ["| mean | predicted | decided |", "|---|---|---|"]
    texts += [f"| {mean.name} | {mean.prediction} | {mean.decision} |" for mean in MEANS]
    return "\n".join([*table, "", *texts])


# --- what is timed ---------------------------------------------------------------------------------------------------


def inputs(preset, batch_size):
    """A student in training, a frozen teacher and classifier, and z_t and t for them."""
    pipeline, classifier, _ = components(preset)
    teacher = pipeline.unet.requires_grad_(False)
    student = copy.deepcopy(teacher).train().requires_grad_(True)
    z = torch.randn(batch_size, *pipeline.image_shape, device=DEVICE)
    return student, teacher, classifier, z, torch.full((batch_size,), 512, device=DEVICE)


def forward(network, z, t, mode=torch.no_grad):
    def call():
        with mode():
            return network(z, t).sample

    return call


def forward_backward(network, z, t):
    return lambda: network(z, t).sample.float().square().mean().backward()


def classify(classifier, images):
    def call():
        output = classifier(images)
        (output.features.sum() + output.logits.sum()).backward()

    return call


def in_bf16(function):
    def call():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return function()

    return call


def bf16():
    for preset, batch_size in TRAINING:
        student, teacher, classifier, z, t = inputs(preset, batch_size)
        images = z.clone().requires_grad_()
        for name, function in (("student forward + backward", forward_backward(student, z, t)),
                               ("teacher forward", forward(teacher, z, t)),
                               ("classifier forward + backward", classify(classifier, images))):  # fmt: skip
            yield f"{name}, {preset}, batch {batch_size}", in_bf16(function), function


def narrow():
    """Both ways under autocast; the weights of the frozen networks already in its type, or cast in every call."""
    config = CFDDistillationConfig(mixed_precision="bf16")
    for preset, batch_size in TRAINING:
        _, teacher, classifier, z, t = inputs(preset, batch_size)
        images = z.clone().requires_grad_()
        kept, judge = frozen(config, teacher, DEVICE), frozen(config, classifier, DEVICE)
        setting = f"{preset}, batch {batch_size}"
        yield f"teacher forward, {setting}", in_bf16(forward(kept, z, t)), in_bf16(forward(teacher, z, t))
        asked = in_bf16(classify(judge, images)), in_bf16(classify(classifier, images))
        yield f"classifier forward + backward, {setting}", *asked


def channels_last():
    for preset, batch_size in TRAINING:
        student, _, classifier, z, t = inputs(preset, batch_size)
        images = z.clone().requires_grad_()
        other, judge = (copy.deepcopy(part).to(memory_format=torch.channels_last) for part in (student, classifier))
        setting = f"{preset}, batch {batch_size}"
        yield f"student, {setting}", forward_backward(other, z, t), forward_backward(student, z, t)
        yield f"student in bf16, {setting}", *map(in_bf16, (forward_backward(n, z, t) for n in (other, student)))
        yield f"classifier, {setting}", classify(judge, images), classify(classifier, images)


def compiling():
    """Whole graphs, none made twice."""
    student, teacher, classifier, z, t = inputs("digits", 64)
    images = z.clone().requires_grad_()
    for name, network, function in (
        ("student forward + backward", student, lambda network: forward_backward(network, z, t)),
        ("teacher forward", teacher, lambda network: forward(network, z, t)),
        ("classifier forward + backward", classifier, lambda network: classify(network, images)),
    ):
        counters.clear()
        began, quick = time.perf_counter(), function(torch.compile(network, dynamic=False, fullgraph=True))
        quick()
        seconds = time.perf_counter() - began
        with torch._dynamo.config.patch(error_on_recompile=True):
            yield f"{name}, digits, batch 64, compiled in {seconds:.0f} s", quick, function(network)
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


def compiled_sampling():
    """The network of a sampler for one image, where Python's share is the largest."""
    for preset in ("digits", "fashion-mnist"):
        pipeline = pipeline_of(preset)
        z, t = torch.randn(1, *pipeline.image_shape, device=DEVICE), torch.tensor(512, device=DEVICE)
        quick = forward(torch.compile(pipeline.unet, dynamic=False), z, t)
        began = time.perf_counter()
        quick()
        setting = f"{preset}, batch 1, compiled in {time.perf_counter() - began:.0f} s"
        yield setting, quick, forward(pipeline.unet, z, t)


def checkpointing():
    for preset, batch_size in TRAINING:
        student, _, _, z, t = inputs(preset, batch_size)
        again = copy.deepcopy(student)
        again.enable_gradient_checkpointing()
        yield f"student, {preset}, batch {batch_size}", forward_backward(again, z, t), forward_backward(student, z, t)


def optimizer():
    for preset, batch_size in TRAINING:
        student, _, _, z, t = inputs(preset, batch_size)
        forward_backward(student, z, t)()
        fused, foreach, single = (
            torch.optim.Adam(student.parameters(), lr=1e-9, **options).step
            for options in ({"fused": True}, {"foreach": True}, {"foreach": False, "fused": False})
        )
        yield f"fused over foreach, {preset}", fused, foreach
        yield f"fused over one by one, {preset}", fused, single


def averaging():
    for preset, _ in TRAINING:
        parameters = list(pipeline_of(preset).unet.parameters())
        ours, stock = (EMAModel(parameters, decay=0.999) for _ in range(2))
        ours = partial(average_step, ours, parameters, torch.tensor(True, device=DEVICE))
        yield preset, ours, partial(stock.step, parameters)


def joint_batch():
    for preset, batch_size in TRAINING:
        _, _, classifier, z, _ = inputs(preset, batch_size)
        images, target = z.clone().requires_grad_(), torch.randn_like(z)

        def together(images=images, target=target, classifier=classifier):
            output = classifier(torch.cat([images, target]))
            (output.features[: len(images)].sum() + output.logits[: len(images)].sum()).backward()

        def apart(images=images, target=target, classifier=classifier):
            with torch.no_grad():
                classifier(target)
            classify(classifier, images)()

        yield f"{preset}, batch {batch_size}", together, apart


def inference_mode():
    for preset, batch_size in TRAINING:
        _, teacher, _, z, t = inputs(preset, batch_size)
        yield f"{preset}, batch {batch_size}", forward(teacher, z, t, torch.inference_mode), forward(teacher, z, t)


def folded():
    for preset, batch_size in TRAINING:
        _, _, classifier, z, _ = inputs(preset, batch_size)
        images, network = z.clone().requires_grad_(), fuse(classifier.network)
        yield (f"classifier forward + backward, {preset}, batch {batch_size}",
               lambda images=images, network=network: network(images).sum().backward(),
               lambda images=images, network=classifier.network: network(images).sum().backward())  # fmt: skip


def onnx_runtime():
    """`to_onnx_runtime`, network against network in float32."""
    for preset, batch_size in (*((preset, 1) for preset in PRESETS), *TRAINING):
        pipeline = pipeline_of(preset)
        z, t = torch.randn(batch_size, *pipeline.image_shape), torch.tensor(512)
        quick = forward(to_onnx_runtime(pipeline).unet, z, t)
        yield f"{preset}, batch {batch_size}", quick, forward(pipeline.unet, z, t)


def open_vino():
    """Where it is installed, in float32."""
    if importlib.util.find_spec("openvino") is None:
        return
    import openvino

    for preset, batch_size in (*((preset, 1) for preset in PRESETS), *TRAINING):
        pipeline = pipeline_of(preset)
        unet = Bare(pipeline.unet)
        z, t = torch.randn(batch_size, *pipeline.image_shape), torch.full((batch_size,), 512)
        options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        with torch.no_grad():
            model = openvino.convert_model(unet, example_input=(z, t), input=[tuple(z.shape), tuple(t.shape)])
        request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
        eager, given = torch.no_grad()(lambda z=z, t=t, unet=unet: unet(z, t)), [z.numpy(), t.numpy()]
        yield f"{preset}, batch {batch_size}", lambda request=request, given=given: request.infer(given), eager


class Bare(torch.nn.Module):
    """A U-Net as (z, t) -> tensor, for export."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, z, t):
        return self.unet(z, t, return_dict=False)[0]


MEANS = [
    Mean("bf16 autocast", "0.6 for the networks with bf16 instructions, 0.9 for the smallest",
         "an option, `mixed_precision`; off by default, as it is slower without such instructions", bf16),
    Mean("weights of the frozen networks in bf16", "0.97: a cast of 1 to 11 M weights in every call",
         "kept, part of `mixed_precision`: the same numbers to the bit (a test), half the bytes, time where the "
         "classifier is large",
         narrow),
    Mean("channels_last", "1.0: oneDNN blocks its own layouts", "an option for GPUs, off by default", channels_last),
    Mean("torch.compile", "0.8, after a minute of compiling for each network",
         "an option, `torch_compile`, off by default: only long runs earn the compiling back; no graph break, nothing "
         "compiled twice (asserted)", compiling),
    Mean("torch.compile of a sampler's network", "0.4 for the smallest, 0.9 else",
         "nothing to keep: `pipeline.unet = torch.compile(pipeline.unet)` works; ONNX Runtime "
         "is faster, and ready in seconds", compiled_sampling),
    Mean("gradient checkpointing of the student", "1.3: one more forward pass",
         "an option, `gradient_checkpointing`, off by default: it buys memory with time", checkpointing),
    Mean("fused Adam", "0.5 of foreach, 0.2 of one by one", "kept, always on", optimizer),
    Mean("averages by foreach, no waiting", "0.5 of EMAModel.step",
         "kept: never slower, and it leaves a skipped step out without waiting for the device", averaging),
    Mean("classifier: student and teacher images in one batch", "1.2: the teacher's half goes backward too",
         "not kept", joint_batch),
    Mean("teacher in inference mode", "0.98, less bookkeeping",
         "not kept: its outputs cannot enter a loss as they are", inference_mode),
    Mean("batch norm folded into convolution", "0.8 of the classifier, 0.98 of a step",
         "not kept: a step gains less than it varies, and any backbone must stay possible", folded),
    Mean("ONNX Runtime for sampling", "0.7 at batch 1, 0.9 else",
         "kept, the extra `onnx` with `to_onnx_runtime`: for single images 8, 2.8 and 1.4 times as fast",
         onnx_runtime),
    Mean("OpenVINO for sampling", "as ONNX Runtime",
         "not kept: slower for single images of small networks, and its torch.compile backend fails with this torch",
         open_vino),
]  # fmt: skip
