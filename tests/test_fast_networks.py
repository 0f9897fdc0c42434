"""What makes training faster changes no result: the same loss curve as a plainly written loop, and as without it."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from diffusers_rcfd import CFDDistillationConfig, CFDDistillationTrainer, load_image_data
from diffusers_rcfd.losses.features import feature_kl
from diffusers_rcfd.losses.predictions import diversity, entropy
from diffusers_rcfd.trainers.fast_networks import compile_network, freeze, narrow, set_memory_format
from tests.toys import parameters, tiny_classifier, tiny_teacher, tiny_unet

BATCH, RATE = 8, 5e-4
WEIGHTS = "1-step/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def digits():
    return load_image_data(max_images=64)


def classifier():
    """Random, its batch norm used to noise, so that its features tell images apart."""
    torch.manual_seed(1)
    network = tiny_classifier()
    with torch.no_grad():
        for _ in range(30):
            network(torch.randn(32, 1, 8, 8))
    return network.eval()


def student():
    return tiny_teacher(seed=1).unet


def trainer(folder, digits, steps, **options):
    """One rung of RCFD with a tiny network, every step logged."""
    defaults = {"student_steps": [1], "objective": ["rcfd"], "max_train_steps": [steps], "train_batch_size": BATCH,
                "learning_rate": RATE, "lr_scheduler": "constant", "logging_steps": 1, "checkpointing_steps": 0,
                "temperature": [0.9], "regularization_weight": [0.003], "entropy_ratio": [0.5]}  # fmt: skip
    config = CFDDistillationConfig(str(folder), **(defaults | options))
    return CFDDistillationTrainer(tiny_teacher(2), classifier(), config, digits, student())


def curve(folder):
    """The loss at every step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines])


def seen_by(run):
    """The run's batches, images as they came and the draws, as `pairs` sees them."""
    seen, pairs = [], run.pairs
    run.pairs = lambda stage, batch: seen.append(batch) or pairs(stage, batch)
    return seen


def plain_curve(batches, ema_decay):
    """The same training written plainly on the same batches; its losses, and the averaged weights."""
    teacher, network, judge = tiny_teacher(2), student().train(), classifier()
    scheduler, losses = teacher.scheduler, []
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, foreach=False, fused=False)
    average = [parameter.detach().clone() for parameter in network.parameters()]
    for number, batch in enumerate(batches, 1):
        x0, t = batch["images"], torch.full((BATCH,), 1024)
        (a_t, s_t), (a_s, s_s), (a_0, s_0) = (scheduler.alpha_sigma(t - i, x0) for i in (0, 512, 1024))
        z_t = a_t * x0 + s_t * batch["noise"]
        with torch.no_grad():
            x = teacher.unet(z_t, t).sample
            z_s = a_s * x + s_s * (z_t - a_t * x) / s_t
            x = teacher.unet(z_s, t - 512).sample
            z_0 = a_0 * x + s_0 * (z_s - a_s * x) / s_s
            target = judge((z_0 - s_0 / s_t * z_t) / (a_0 - s_0 / s_t * a_t))
        output = judge(network(z_t, t).sample)
        loss = feature_kl(output.features, target.features, 0.9).mean()
        loss = loss + 0.003 * (0.5 * entropy(output.logits).mean() + 0.5 * diversity(output.logits))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        decay = min(ema_decay, (1 + number) / (10 + number))
        for kept, parameter in zip(average, network.parameters(), strict=True):
            kept.mul_(decay).add_(parameter.detach(), alpha=1 - decay)
    return torch.tensor(losses), torch.cat([kept.flatten() for kept in average])


def test_defaults_have_the_loss_curve_of_plain_training(tmp_path, digits):
    """200 steps: fused Adam, averages by `foreach`, images kept as uint8, steps checked on the device."""
    run = trainer(tmp_path, digits, 200, ema_decay=0.99)
    batches = seen_by(run)
    trained = run.train().unet
    losses, weights = plain_curve(batches, 0.99)
    assert losses[-20:].mean() < 0.5 * losses[:3].mean()  # there is a curve
    assert_same_curve(curve(tmp_path), losses)
    torch.testing.assert_close(parameters(trained), weights, rtol=0, atol=3e-3)
    assert (weights - parameters(student())).abs().max() > 0.02


def assert_same_curve(losses, expected, early=1e-4, late=5e-2):
    """To rounding (relative) for 50 steps, then as far as 150 more make of it; Adam turns signs of small gradients."""
    torch.testing.assert_close(losses[:50], expected[:50], rtol=early, atol=1e-6)
    torch.testing.assert_close(losses, expected, rtol=late, atol=0)


@pytest.mark.parametrize(
    "options, noise",
    [
        ({"channels_last": True}, {}),
        ({"mixed_precision": "bf16"}, {"early": 0.1, "late": 0.15}),
        pytest.param({"torch_compile": True}, {}, marks=pytest.mark.slow),
    ],
    ids=["channels_last", "bf16", "torch_compile"],
)
def test_options_have_the_loss_curve_of_the_defaults(tmp_path, digits, options, noise):
    trainer(tmp_path / "default", digits, 200).train()
    AcceleratorState._reset_state(reset_partial_state=True)  # which keeps one number type for the process
    trainer(tmp_path / "option", digits, 200, **options).train()
    expected, losses = curve(tmp_path / "default"), curve(tmp_path / "option")
    assert not torch.equal(losses, expected)  # the option did something
    assert_same_curve(losses, expected, **noise)


def test_channels_last_is_of_training_alone(tmp_path, digits):
    """Every network of a step has that layout, also after sampling; what is saved and handed over has not."""
    options = {"channels_last": True, "sample_steps": 1, "num_sample_images": 4, "ema_decay": 0.5}
    run = trainer(tmp_path, digits, 2, **options)
    layouts, compute_loss = [], run.compute_loss

    def look(stage, batch):
        layouts.append(
            [is_channels_last(part) for part in (stage.model, stage.teacher.network, stage.guides.classifier)]
        )
        return compute_loss(stage, batch)

    run.compute_loss = look
    student = run.train()
    assert layouts == [[True] * 3] * 2
    assert not is_channels_last(student.unet)
    torch.testing.assert_close(load_file(tmp_path / WEIGHTS), student.unet.state_dict(), rtol=0, atol=0)


def test_gradient_checkpointing_saves_memory_and_changes_nothing(tmp_path, digits):
    """Losses and weights are bit-identical, fewer bytes wait for the backward pass, and the student is a plain one."""
    kept, students = {}, {}
    for name, given in (("off", False), ("on", True)):
        run = trainer(tmp_path / name, digits, 5, objective=["pd"], gradient_checkpointing=given)
        saved, compute_loss = [], run.compute_loss

        def counted(stage, pair, saved=saved, compute_loss=compute_loss):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
                return compute_loss(stage, pair)

        run.compute_loss = counted
        students[name], kept[name] = run.train().unet, sum(saved)
    assert torch.equal(curve(tmp_path / "on"), curve(tmp_path / "off"))
    assert torch.equal(parameters(students["on"]), parameters(students["off"]))
    assert kept["on"] < 0.5 * kept["off"]
    assert not students["on"].is_gradient_checkpointing


def is_channels_last(network):
    weights = [weight for weight in network.parameters() if weight.ndim == 4 and min(weight.shape[1:]) > 1]
    return all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize("option", ["channels_last", pytest.param("torch_compile", marks=pytest.mark.slow)])
def test_resumed_run_may_have_another_option(tmp_path, digits, option, monkeypatch):
    """Checkpoints hold plain weights."""
    monkeypatch.setattr(torch, "compile", eager_compile)
    options = {"checkpointing_steps": 2, "checkpoints_total_limit": 5, "ema_decay": 0.5}
    trainer(tmp_path / "with", digits, 4, **options, **{option: True}).train()
    middle = str(tmp_path / "with/checkpoint-2")
    trainer(tmp_path / "without", digits, 4, **options, resume_from_checkpoint=middle).train()
    with_it, without = (load_file(tmp_path / name / WEIGHTS) for name in ("with", "without"))
    torch.testing.assert_close(without, with_it, rtol=1e-2, atol=5e-4)


COMPILE = torch.compile


def eager_compile(network, **options):
    """`torch.compile` without the minute of its C++ compiler: the same wrapper, capture and guards."""
    return COMPILE(network, backend="eager", **options)


def test_compiling_breaks_no_graph_and_repeats_nothing(tmp_path, digits, monkeypatch):
    """Student, teacher and classifier are captured whole in the first steps, and never again, sampling between."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", eager_compile)
    torch.compiler.reset()
    counters.clear()
    options = {"torch_compile": True, "sample_steps": 3, "num_sample_images": 4, "ema_decay": 0.5}
    run = trainer(tmp_path, digits, 6, **options)
    graphs, compute_loss = [], run.compute_loss

    def count(stage, batch):
        graphs.append(counters["stats"]["unique_graphs"])
        return compute_loss(stage, batch)

    run.compute_loss = count
    student = run.train()
    assert not counters["graph_break"]
    assert graphs[0] == 1 and graphs[2] == 4  # teacher, then student, classifier with and without gradient
    assert graphs[2:] == [4] * 4
    assert type(student.unet) is type(tiny_unet())
    assert torch.equal(load_file(tmp_path / WEIGHTS)["conv_in.weight"], student.unet.conv_in.weight)


def test_networks_are_themselves_without_the_options():
    config, network = CFDDistillationConfig(), tiny_unet()
    assert set_memory_format(config, network) is compile_network(config, network) is network
    assert freeze(config, network, torch.device("cpu")) is network
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("make", [tiny_unet, classifier], ids=["teacher", "classifier"])
@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_frozen_networks_keep_less_and_compute_the_same(make, mixed_precision):
    """Values and gradients are bit-identical under autocast, and the given network is left as it is."""
    network = make().eval().requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    kept = freeze(CFDDistillationConfig(mixed_precision=mixed_precision), network, torch.device("cpu"))
    dtype, answers = {"bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision], []
    for each in (network, kept):
        images = torch.linspace(-1, 1, 256).view(4, 1, 8, 8).requires_grad_()
        with torch.autocast("cpu", dtype):
            output = each(images, torch.arange(4)).sample if make is tiny_unet else each(images).features
        output.float().square().sum().backward()
        answers.append((output, images.grad))
    for ours, theirs in zip(*answers, strict=True):
        assert torch.equal(ours, theirs) and ours.abs().sum() > 0
    assert memory_of(kept) < 0.6 * memory_of(network)
    for name, value in network.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])


def memory_of(network):
    return sum(parameter.nbytes for parameter in network.parameters())


def test_narrow_is_the_network_itself_in_float32():
    network = tiny_unet()
    assert narrow(CFDDistillationConfig(), network) is network
