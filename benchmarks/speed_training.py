"""Steps of training against their parts, the plain way and the real loader; their memory, and how both grow.

python benchmarks/speed_training.py '{"way": "ours", "preset": "digits"}'    # bytes that a step takes
"""

import copy
import json
import math
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from paired import DEVICE, components, ratio, row, seconds
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from diffusers_rcfd import CFDDistillationConfig, CFDDistillationTrainer
from diffusers_rcfd.trainers.batches import endless_batches


@contextmanager
def training(objective, preset="digits", batch_size=64, network=None, **options):
    """A trainer in the middle of its first rung, with a function that makes one step."""
    pipeline, classifier, images = components(preset, network)
    with tempfile.TemporaryDirectory() as folder:
        config = CFDDistillationConfig(folder, student_steps=[4], objective=[objective], train_batch_size=batch_size,
                                       logging_steps=50, checkpointing_steps=0, max_train_steps=[100_000],
                                       **options)  # fmt: skip
        trainer = CFDDistillationTrainer(pipeline, classifier, config, images)
        del pipeline, classifier  # of which training may keep copies in another number type
        stage = trainer.begin_rung(0, trainer.teacher, trainer.freeze_guides())
        optimizer, lr_scheduler = trainer._prepare(stage)
        fixed = next(endless_batches(trainer.accelerator, images, config, trainer.state))

        def step(batch=None):
            (draws,) = trainer._draws(stage)
            trainer._train_step(stage, [(batch or fixed) | draws], optimizer, lr_scheduler)
            trainer.state.step += 1

        yield trainer, step, fixed, optimizer, stage
    AcceleratorState._reset_state(True)  # which keeps one number type for the process


def overhead(pairs):
    """A training step over its parts: networks, backward passes and optimizer, each alone."""
    for preset in ("digits", "fashion-mnist"):
        batch_size = 64 if preset == "digits" else 16
        with training("rcfd", preset, batch_size) as (_, step, fixed, optimizer, stage):
            student, teacher, classifier = stage.model, stage.teacher.network, stage.guides.classifier
            z = torch.randn_like(fixed["images"])
            t = torch.full((len(z),), 512, device=DEVICE)

            def parts(student=student, teacher=teacher, classifier=classifier, z=z, t=t, optimizer=optimizer):
                with torch.no_grad():
                    target = teacher(teacher(z, t).sample, t).sample
                    classifier(target)
                output = classifier(student(z, t).sample)
                (output.features.sum() + output.logits.sum()).backward()
                optimizer.step()
                optimizer.zero_grad()

            yield row("RCFD step / its parts", f"{preset}, batch {batch_size}", ratio(step, parts, pairs, 0.3), 1.05)


class PlainData(Dataset):
    """Images as research code loads them: from PIL, one by one, through torchvision's transforms."""

    def __init__(self, images, size, channels):
        from torchvision import transforms

        self.images = images
        mean = (0.5,) * channels
        self.transform = transforms.Compose(
            [transforms.ToPILImage(), transforms.Resize(size), transforms.RandomHorizontalFlip(),
             transforms.ToTensor(), transforms.Normalize(mean, mean)]
        )  # fmt: skip

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index])


def plain_step(objective, pipeline, classifier, data, batch_size):
    """The same algorithm written plainly: eager, float32, Adam as it comes, the loss read at every step."""
    scheduler, teacher = pipeline.scheduler, pipeline.unet
    student = copy.deepcopy(teacher).train().requires_grad_(True)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-5, foreach=False, fused=False)
    size, channels = pipeline.image_shape[1], pipeline.image_shape[0]
    images = PlainData([data[i]["images"] for i in range(len(data))], size, channels)

    def forever():
        while True:
            yield from DataLoader(images, batch_size, shuffle=True, drop_last=True, num_workers=0)

    batches, grid, losses = forever(), torch.tensor(scheduler.grid(8)), []

    def step():
        x0 = next(batches).to(DEVICE)
        k = torch.randint(1, 5, (batch_size,)) * 2
        noise = torch.randn_like(x0)
        t, s, r = (grid[k - i].to(DEVICE) for i in (0, 1, 2))
        (a_t, s_t), (a_s, s_s), (a_r, s_r) = (scheduler.alpha_sigma(i, x0) for i in (t, s, r))
        z_t = a_t * x0 + s_t * noise
        with torch.no_grad():
            x = teacher(z_t, t).sample
            z_s = a_s * x + s_s * (z_t - a_t * x) / s_t
            x = teacher(z_s, s).sample
            z_r = a_r * x + s_r * (z_s - a_s * x) / s_s
            target = (z_r - s_r / s_t * z_t) / (a_r - s_r / s_t * a_t)
        predicted = student(z_t, t).sample
        if objective == "pd":
            weight = torch.clamp((a_t / s_t) ** 2, min=1)
            loss = (weight * (predicted - target) ** 2).mean()
        else:
            of_student = classifier(predicted)
            with torch.no_grad():
                of_teacher = classifier(target)
            p = F.softmax(of_teacher.features / 0.95, 1)
            kl = (p * (p.log() - F.log_softmax(of_student.features, 1))).sum(1).mean()
            q = F.softmax(of_student.logits, 1)
            entropy = -(q * q.log()).sum(1).mean()
            diversity = (q.mean(0) * q.mean(0).log()).sum()
            loss = kl + 0.003 * (0.75 * entropy + 0.25 * diversity)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())

    return step


def plain(pairs):
    """A step with its loader over the plain way's, in the number type that is the faster here."""
    for preset, batch_size in (("digits", 64), ("fashion-mnist", 16)):
        for objective in ("pd", "rcfd"):
            for mixed_precision in ("no", "bf16"):
                with training(objective, preset, batch_size, mixed_precision=mixed_precision) as made:
                    trainer, step, *_ = made
                    batches = endless_batches(
                        trainer.accelerator, trainer.train_dataset, trainer.config, trainer.state
                    )
                    plainly = plain_step(objective, *components(preset), batch_size)
                    quartiles = ratio(lambda step=step, b=batches: step(next(b)), plainly, pairs, 0.5)
                setting = f"{objective.upper()}, {preset}, batch {batch_size}, mixed_precision {mixed_precision}"
                yield row("step / the plain way", setting, quartiles, 0.75 if DEVICE.type == "cpu" else 0.4)


def data(pairs):
    """Time of a step with a fixed batch over that of one with the real loader."""
    with training("pd") as (trainer, step, *_):
        batches = endless_batches(trainer.accelerator, trainer.train_dataset, trainer.config, trainer.state)
        quartiles = ratio(lambda: step(next(batches)), step, pairs, 0.5)
    yield row("step with loader / fixed batch", "PD, digits, batch 64", quartiles, 1 / 0.97)


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(pairs):
    """Peak memory of a step over the plain way's, each in processes of its own."""
    for preset, batch_size in (("digits", 64), ("fashion-mnist", 16)):
        for objective in ("pd", "rcfd"):
            setting = {"preset": preset, "batch_size": batch_size, "objective": objective}
            plainly = [bytes_of(way="plain", **setting) for _ in range(min(pairs, 3))]
            for mixed_precision, again in (("no", False), ("no", True), ("bf16", False)):
                options = {"mixed_precision": mixed_precision, "gradient_checkpointing": again}
                ours = [bytes_of(way="ours", **setting, **options) for _ in plainly]
                quartiles = statistics.quantiles([a / b for a, b in zip(ours, plainly, strict=True)], n=4)
                text = f"{objective.upper()}, {preset}, batch {batch_size}, mixed_precision {mixed_precision}"
                text += ", gradient_checkpointing" * again
                yield row("memory of a step / the plain way's", text, quartiles, 0.8)


def bytes_of(**setting):
    """Peak memory of a step, measured by `measure_memory` in a process that does nothing else."""
    command = [sys.executable, __file__, json.dumps(setting)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def measure_memory(way, preset, batch_size=64, objective="rcfd", network=None, **options):
    """Bytes at the peak of three steps, over those before networks and images were made.

    On a CPU it is the resident size of the process, whose peak Linux forgets when told to.
    """
    plain_step("rcfd", *components("digits"), batch_size=1)()  # all libraries are loaded
    before = resident("VmRSS")
    if DEVICE.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    if way == "ours":
        with training(objective, preset, batch_size, network, **options) as (_, step, _, _):
            for _ in range(3):
                step()
    else:
        pipeline, classifier, images = components(preset, network)
        unet, shape = pipeline.unet.train(), (batch_size, *pipeline.image_shape)
        z, t = torch.randn(shape, device=DEVICE), torch.full((batch_size,), 512, device=DEVICE)
        step = (lambda: unet(z, t).sample.square().mean().backward()) if way == "network" else None
        step = step or plain_step(objective, pipeline, classifier, images, batch_size)
        for _ in range(3):
            step()
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else resident("VmHWM") - before


def resident(name):
    """Bytes by which Linux counts this process's memory: "VmRSS" now, "VmHWM" at its peak."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


# --- the hardware ----------------------------------------------------------------------------------------------------


def utilisation(pairs, size=2048):
    """FLOPs of a step (convolutions, matrix products, attention; two for a multiply-add) a second, as a share of
    those that a product of two large matrices of the same number type reaches.
    """
    for preset, batch_size in (("digits", 64), ("fashion-mnist", 16)):
        for mixed_precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
            with training("rcfd", preset, batch_size, mixed_precision=mixed_precision) as (_, step, _, _):
                with FlopCounterMode(display=False) as counter:
                    step()
                matrix, count = torch.randn(size, size, dtype=dtype, device=DEVICE), counter.get_total_flops()
                times = ratio(lambda m=matrix: m @ m, step, pairs, 0.3)
            setting = f"RCFD, {preset}, batch {batch_size}, {count / 1e9:.1f} GFLOP, mixed_precision {mixed_precision}"
            yield row("share of the matrix rate", setting, [count / (2 * size**3) * time for time in times], None)


# --- where the time goes ---------------------------------------------------------------------------------------------


def profiles(steps=20, largest=8):
    """A table of what an RCFD step spends its time on: shares of the operators' own time, by torch.profiler."""
    shares = {}
    for preset, batch_size in (("digits", 64), ("fashion-mnist", 16)):
        for mixed_precision in ("no", "bf16"):
            with training("rcfd", preset, batch_size, mixed_precision=mixed_precision) as (_, step, _, _):
                step()
                with torch.profiler.profile() as profile:
                    for _ in range(steps):
                        step()
            spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
            total = sum(spent.values())
            shares[f"{preset}, {mixed_precision}"] = {name: time / total for name, time in spent.items()}
    names = sorted({name for column in shares.values() for name in column},
                   key=lambda name: -max(column.get(name, 0) for column in shares.values()))  # fmt: skip
    lines = [f"| operator | {' | '.join(shares)} |", "|---|" + "---:|" * len(shares)]
    for name in names[:largest]:
        lines.append(f"| `{name}` | " + " | ".join(f"{column.get(name, 0):.1%}" for column in shares.values()) + " |")
    rest = (sum(column.get(name, 0) for name in names[largest:]) for column in shares.values())
    return "\n".join([*lines, "| all others | " + " | ".join(f"{share:.1%}" for share in rest) + " |"])


# --- growth ----------------------------------------------------------------------------------------------------------

GROWTH = {  # three sizes of each kind on the digits: batch size and options of the network
    "batch 16, 64, 256": [(16, {}), (64, {}), (256, {})],
    "image size 8, 16, 32": [(16, {"sample_size": size}) for size in (8, 16, 32)],
    "parameters": [(16, {"block_out_channels": (c, 2 * c)}) for c in (16, 32, 64)],
}


def growth(pairs):
    """Log-log slopes of an RCFD step over those of its network's forward + backward alone."""
    for kind, sizes in GROWTH.items():
        with ExitStack() as stack:
            sides = [side(stack, batch_size, network) for batch_size, network in sizes]
            times = [[(seconds(step, 2), seconds(bare, 2)) for _ in range(pairs)] for _, step, bare in sides]
        yield compared(f"time, {kind}", [amount for amount, _, _ in sides], times)
        rounds = []
        for batch_size, network in sizes:
            setting = {"preset": "digits", "batch_size": batch_size, "network": network}
            rounds.append([tuple(bytes_of(way=way, **setting) for way in ("ours", "network")) for _ in range(2)])
        yield compared(f"memory, {kind}", [amount for amount, _, _ in sides], rounds)


def side(stack, batch_size, network):
    """How large a setting is, and functions for our step and the bare network's forward + backward."""
    _, step, fixed, _, stage = stack.enter_context(training("rcfd", "digits", batch_size, network))
    unet = copy.deepcopy(stage.model)
    z, t = torch.randn_like(fixed["images"]), torch.full((batch_size,), 512, device=DEVICE)
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    amount = network.get("sample_size") or (parameters if network else batch_size)
    return amount, step, lambda: unet(z, t).sample.square().mean().backward()


def compared(setting, amounts, rounds):
    """A row of the ratio of two slopes, from for each amount a list of (ours, bare)."""
    slopes = [[slope(amounts, [values[i][which] for values in rounds]) for i in range(len(rounds[0]))]
              for which in (0, 1)]  # fmt: skip
    quartiles = statistics.quantiles([a / b for a, b in zip(*slopes, strict=True)], n=4)
    ours, bare = (statistics.median(values) for values in slopes)
    return row("slope of a step / of its network", f"{setting}: {ours:.2f} and {bare:.2f}", quartiles, 1.0)


def slope(amounts, values):
    """Of the least-squares line through the logarithms."""
    return statistics.linear_regression([math.log(x) for x in amounts], [math.log(y) for y in values]).slope


if __name__ == "__main__":
    print(measure_memory(**json.loads(sys.argv[1])))
