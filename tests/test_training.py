import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import load_file

from diffusers_rcfd import DiffusionConfig, DiffusionTrainer, RCFDScheduler, load_image_data
from diffusers_rcfd.data.image_data import StreamingImageData
from diffusers_rcfd.trainers.batches import RandomBatches, derived_seed
from diffusers_rcfd.trainers.checkpoints import find_checkpoints
from diffusers_rcfd.trainers.interruption import ECHO_SECONDS
from tests.toys import parameters, tiny_unet


@pytest.fixture(scope="module")
def digits():
    return load_image_data(max_images=64)


def trainer(folder, digits, *, unet=None, **options):
    torch.manual_seed(0)
    defaults = {
        "max_train_steps": 6,
        "train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "ema_decay": 0.9,
        "logging_steps": 3,
        "checkpointing_steps": 2,
        "sample_steps": 3,
        "num_sample_images": 4,
        "sample_inference_steps": 2,
    }
    config = DiffusionConfig(output_dir=str(folder), **(defaults | options))
    return DiffusionTrainer(unet or tiny_unet(dropout=0.1), RCFDScheduler(), config, digits)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def interrupted(run, at):
    """The trainer, with an interruption in step `at`."""
    compute_loss = run.compute_loss

    def interrupt(stage, batch):
        if run.state.step == at:
            raise KeyboardInterrupt
        return compute_loss(stage, batch)

    run.compute_loss = interrupt
    return run


def test_batches_visit_every_image_once_an_epoch_and_begin_anywhere():
    batches = list(zip(range(20), RandomBatches(23, 4, seed=1), strict=False))
    for epoch in range(4):
        indices = [index for _, batch in batches[5 * epoch : 5 * epoch + 5] for index in batch]
        assert len(set(indices)) == 20
    assert [b for _, b in batches[:5]] != [b for _, b in batches[5:10]]
    later = list(zip(range(13), RandomBatches(23, 4, seed=1, first=7), strict=False))
    assert [b for _, b in later] == [b for _, b in batches[7:]]


def test_batches_of_processes_are_shares_of_one_batch():
    whole = list(zip(range(9), RandomBatches(23, 6, seed=1), strict=False))
    shares = [list(zip(range(9), RandomBatches(23, 3, 1, 0, p, 2), strict=False)) for p in range(2)]
    for (_, batch), (_, first), (_, second) in zip(whole, *shares, strict=True):
        assert batch == first + second


def test_a_run_leaves_its_records(tmp_path, digits):
    pipe = trainer(tmp_path, digits, report_to="tensorboard").train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["global_step"] for line in lines] == [3, 6]
    assert {"loss", "grad_norm", "learning_rate", "stage", "step"} <= lines[0].keys()
    assert lines[-1]["learning_rate"] == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"]["max_train_steps"] == 6 and "torch" in record["versions"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["base-0000003.png", "base-0000006.png"]
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    assert list((tmp_path / "logs").rglob("events*"))
    saved = load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(saved, pipe.unet.state_dict(), rtol=0, atol=0)


def test_ema_is_what_is_saved(tmp_path, digits):
    averaged = trainer(tmp_path / "ema", digits).train()
    plain = trainer(tmp_path / "plain", digits, ema_decay=0.0).train()
    assert (parameters(averaged.unet) - parameters(plain.unet)).abs().max() > 1e-4


@pytest.mark.parametrize("stop", [2, 4])
def test_resumed_run_is_bit_identical(tmp_path, digits, stop):
    """Dropout, EMA, learning-rate schedule, shuffling and the running mean of the metrics all carry over."""
    trainer(tmp_path / "whole", digits).train()
    with pytest.raises(KeyboardInterrupt):
        interrupted(trainer(tmp_path / "resumed", digits), at=stop + 1).train()
    other_start = tiny_unet(dropout=0.1)
    trainer(tmp_path / "resumed", digits, unet=other_start, resume_from_checkpoint="latest").train()
    whole, resumed = files(tmp_path / "whole"), files(tmp_path / "resumed")
    assert whole["metrics.jsonl"] == resumed["metrics.jsonl"]
    for name in ("unet", "samples"):
        assert files(tmp_path / "whole" / name) == files(tmp_path / "resumed" / name)


@pytest.mark.parametrize("checkpointing_steps", [0, 2])
def test_resume_of_a_finished_run_returns_its_model(tmp_path, digits, checkpointing_steps):
    options = {"checkpointing_steps": checkpointing_steps}
    pipe = trainer(tmp_path, digits, **options).train()
    again = trainer(tmp_path, digits, unet=tiny_unet(), resume_from_checkpoint="latest", **options).train()
    assert torch.equal(parameters(pipe.unet), parameters(again.unet))


def test_half_written_checkpoint_is_passed_over(tmp_path, digits):
    trainer(tmp_path, digits).train()
    whole = find_checkpoints(tmp_path)[-1]
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "partial-checkpoint-8").mkdir()
    assert find_checkpoints(tmp_path)[-1] == whole


def test_accumulated_batches_equal_one_large_batch(tmp_path, digits):
    options = {"max_train_steps": 3, "sample_steps": 0}
    torch.manual_seed(0)
    large = trainer(tmp_path / "large", digits, unet=tiny_unet(), train_batch_size=16, **options).train()
    torch.manual_seed(0)
    small = trainer(tmp_path / "small", digits, unet=tiny_unet(), train_batch_size=4, gradient_accumulation_steps=4,
                    **options).train()  # fmt: skip
    torch.testing.assert_close(parameters(large.unet), parameters(small.unet), rtol=1e-4, atol=1e-5)


def test_mixed_precision_trains_and_saves_float32(tmp_path, digits):
    pipe = trainer(tmp_path, digits, mixed_precision="bf16").train()
    saved = load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert torch.isfinite(parameters(pipe.unet)).all()


def test_output_dir_that_is_not_empty(tmp_path, digits):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(ValueError, match="`output_dir` must be an empty folder.*overwrite_output_dir"):
        trainer(tmp_path, digits).train()
    trainer(tmp_path, digits, overwrite_output_dir=True, max_train_steps=1).train()
    assert (tmp_path / "keep.txt").exists()
    with pytest.raises(FileNotFoundError, match="`resume_from_checkpoint` must name a whole checkpoint"):
        trainer(tmp_path, digits, resume_from_checkpoint=str(tmp_path / "checkpoint-77")).train()


def test_batch_larger_than_the_data(tmp_path, digits):
    with pytest.raises(ValueError, match="`train_batch_size` must be at most the 64 images .*, got 65"):
        trainer(tmp_path, digits, train_batch_size=65)


def test_images_and_labels_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"`train_dataset` must hold images of shape .* \(1, 8, 8\).*got \(1, 4, 4\)"):
        trainer(tmp_path, load_image_data(resolution=4, max_images=20))
    unlabelled = load_image_data(label_column="", max_images=20)
    with pytest.raises(ValueError, match=r"class labels in 0\.\.9 .*got no classes"):
        trainer(tmp_path, unlabelled, unet=tiny_unet(num_class_embeds=10))
    with pytest.raises(ValueError, match=r"class labels in 0\.\.4 .*got 10 classes"):
        trainer(tmp_path, load_image_data(max_images=20), unet=tiny_unet(num_class_embeds=5))


def test_streaming_data_resumes_in_the_middle_of_an_epoch(tmp_path):
    digits = load_image_data(streaming=True, max_images=40)
    trainer(tmp_path / "whole", digits, max_train_steps=8).train()
    run = trainer(tmp_path / "resumed", digits, max_train_steps=8)
    with pytest.raises(KeyboardInterrupt):
        interrupted(run, at=7).train()  # of 5 batches an epoch: the checkpoint at 6 stands in the second
    trainer(tmp_path / "resumed", digits, max_train_steps=8, resume_from_checkpoint="latest").train()
    assert files(tmp_path / "whole/unet") == files(tmp_path / "resumed/unet")
    with pytest.raises(ValueError, match="`train_batch_size` must be at most the images that the stream has"):
        trainer(tmp_path / "small", digits, train_batch_size=41).train()


SCRIPT = """
    import sys, torch
    sys.path.insert(0, {root!r})
    from tests.test_training import trainer
    from diffusers_rcfd import load_image_data
    torch.set_num_threads(1)
    options = dict(max_train_steps=60, checkpointing_steps=5)
    trainer(sys.argv[1], load_image_data(max_images=64), resume_from_checkpoint="latest", **options).train()
"""


def test_process_killed_in_the_middle_resumes_bit_identical(tmp_path):
    """SIGKILL, twice, at whatever moment it comes."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    script = textwrap.dedent(SCRIPT.format(root=root))
    command = [sys.executable, "-c", script]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    for checkpoints in (1, 4):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        while process.poll() is None and reached(tmp_path / "killed") < 5 * checkpoints:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True)
    for name in ("unet", "samples"):
        assert files(tmp_path / "whole" / name) == files(tmp_path / "killed" / name)
    assert files(tmp_path / "whole")["metrics.jsonl"] == files(tmp_path / "killed")["metrics.jsonl"]


def reached(folder):
    found = find_checkpoints(folder)
    return int(found[-1].name.removeprefix("checkpoint-")) if found else 0


def test_signal_saves_a_checkpoint_before_leaving(tmp_path, digits):
    """SIGTERM in a step: a checkpoint at its end, exit code 143, and the same weights after going on."""
    trainer(tmp_path / "whole", digits).train()
    run = trainer(tmp_path / "left", digits, checkpointing_steps=0)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as left:
        signalled(run, at=3, numbers=[signal.SIGTERM, signal.SIGTERM]).train()  # the launcher's echo is no second one
    assert left.value.code == 143
    assert [path.name for path in find_checkpoints(tmp_path / "left")] == ["checkpoint-4"]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    options = {"checkpointing_steps": 0, "resume_from_checkpoint": "latest"}
    trainer(tmp_path / "left", digits, **options).train()
    assert files(tmp_path / "whole/unet") == files(tmp_path / "left/unet")
    assert files(tmp_path / "whole")["metrics.jsonl"] == files(tmp_path / "left")["metrics.jsonl"]


def signalled(run, at, numbers, seconds=0.0):
    """The trainer, to which signals are sent in step `at`."""
    compute_loss = run.compute_loss

    def send(stage, batch):
        if run.state.step == at:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(seconds)
        return compute_loss(stage, batch)

    run.compute_loss = send
    return run


def test_second_signal_leaves_at_once(tmp_path, digits):
    run = trainer(tmp_path, digits, checkpointing_steps=0)
    with pytest.raises(SystemExit) as left:
        signalled(run, at=3, numbers=[signal.SIGINT, signal.SIGINT], seconds=1.1 * ECHO_SECONDS).train()
    assert left.value.code == 130 and not find_checkpoints(tmp_path)
    assert run.state.step == 3


def test_signal_in_the_last_step_leaves_a_finished_run(tmp_path, digits):
    with pytest.raises(SystemExit) as left:
        signalled(trainer(tmp_path, digits), at=5, numbers=[signal.SIGINT]).train()
    assert left.value.code == 130
    assert (tmp_path / "model_index.json").is_file()
    again = trainer(tmp_path, digits, resume_from_checkpoint="latest")
    again.compute_loss = None  # nothing is left to train
    again.train()


def poisoned(run, steps, value=float("nan")):
    """The trainer, whose loss is not finite in some steps."""
    compute_loss = run.compute_loss

    def poison(stage, batch):
        terms = compute_loss(stage, batch)
        return terms | {"loss": terms["loss"] + (value if run.state.step in steps else 0)}

    run.compute_loss = poison
    return run


def everything(stage, optimizer):
    average = [value.clone() for value in stage.ema.shadow_params]
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    return [value.clone() for value in stage.model.parameters()], average, moments


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, digits, value, optimizer):
    run = poisoned(trainer(tmp_path, digits, optimizer=optimizer, sample_steps=0, max_grad_norm=0.0), {0, 2}, value)
    train_step, seen = run._train_step, []

    def record(stage, batches, optimizer, lr_scheduler):
        terms = train_step(stage, batches, optimizer, lr_scheduler)
        seen.append(everything(stage, optimizer))
        return terms

    run._train_step = record
    run.train()
    for kind in range(3):
        same = [all(map(torch.equal, *pair)) for pair in zip([s[kind] for s in seen], [s[kind] for s in seen[1:]],
                                                            strict=False)]  # fmt: skip
        assert same == [False, True, False, False, False]
    assert all(torch.isfinite(value).all() for kind in seen[-1] for value in kind)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [2, 0]
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)


def test_gradient_that_is_not_finite_is_skipped(tmp_path, digits):
    run = trainer(tmp_path, digits, sample_steps=0, logging_steps=1)
    compute_loss = run.compute_loss

    def infinite_slope(stage, batch):
        terms = compute_loss(stage, batch)
        zero = terms["loss"] - terms["loss"].detach()
        return terms | {"loss": terms["loss"] + (zero.sqrt() if run.state.step == 1 else 0)}

    run.compute_loss = infinite_slope
    run.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 0, 0, 0, 0]


def test_too_many_skipped_steps_in_a_row_end_the_run_with_a_report(tmp_path, digits):
    run = poisoned(trainer(tmp_path, digits, max_train_steps=20, max_skipped_steps=3), {1, 2, 4, 5, 6, 7})
    with pytest.raises(FloatingPointError, match="3 steps in a row .*up to step 7 of base.*loss=nan, grad_norm=nan.*"
                                                 "checkpoint-6"):  # fmt: skip
        run.train()
    assert run.state.step == 7


def in_half_precision(run, init_scale):
    """fp16 on the CPU, for which Accelerate would ask for a GPU."""
    run.accelerator.state._mixed_precision, run.accelerator.native_amp = "fp16", True
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)


def test_grad_scaler_looking_for_its_scale_is_not_mistaken(tmp_path, digits):
    """A scale that overflows for more steps than may be skipped in a row, then fits; and numbers that are wrong."""
    options = {"max_train_steps": 30, "max_skipped_steps": 2, "sample_steps": 0, "logging_steps": 30}
    run = trainer(tmp_path / "overflow", digits, **options)
    wrong = poisoned(trainer(tmp_path / "wrong", digits, **options), range(30))
    in_half_precision(run, init_scale=2.0**40)
    run.train()
    assert 1 < run.accelerator.scaler.get_scale() < 2.0**37
    line = json.loads((tmp_path / "overflow/metrics.jsonl").read_text().splitlines()[-1])
    assert line["skipped_steps"] == 0 and line["loss"] > 0
    in_half_precision(wrong, init_scale=4.0)
    with pytest.raises(FloatingPointError, match="up to step 4 "):  # at scales 1/2 and 1/4
        wrong.train()


class Breaking(StreamingImageData):
    """A stream whose source fails for good after some images."""

    def __iter__(self):
        for number, item in enumerate(super().__iter__()):
            if number == 26:
                raise ConnectionError("connection reset by peer")
            yield item


def test_stream_that_raises_leaves_a_checkpoint_and_names_itself(tmp_path):
    digits = load_image_data(streaming=True, max_images=40)
    broken = copy.copy(digits)
    broken.__class__ = Breaking
    options = {"max_train_steps": 8, "checkpointing_steps": 0}
    with pytest.raises(RuntimeError, match="`train_dataset` digits .*after step 3 of base: ConnectionError: "
                                           "connection reset .*checkpoint-3"):  # fmt: skip
        trainer(tmp_path / "broken", broken, **options).train()
    trainer(tmp_path / "broken", digits, resume_from_checkpoint="latest", **options).train()
    trainer(tmp_path / "whole", digits, **options).train()
    assert files(tmp_path / "whole/unet") == files(tmp_path / "broken/unet")


class Mortal(torch.utils.data.Dataset):
    """Images whose reader, a worker of the loader, dies at a certain one."""

    image_shape, num_classes, name = (1, 8, 8), 10, "mortal"

    def __init__(self, digits, last):
        self.digits, self.last = digits, last

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, index):
        if index == self.last and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.digits[index]


def test_dead_worker_leaves_a_checkpoint_and_an_error(tmp_path, digits):
    last = next(itertools.islice(RandomBatches(64, 8, derived_seed(0, 0)), 4, None))[0]
    options = {"checkpointing_steps": 0, "sample_steps": 0}
    run = trainer(tmp_path / "dead", Mortal(digits, last), dataloader_num_workers=1, **options)
    with pytest.raises(RuntimeError, match="`train_dataset` mortal failed after step .*checkpoint-"):
        run.train()
    assert [path.name for path in find_checkpoints(tmp_path / "dead")] == [f"checkpoint-{run.state.step}"]
    healthy = Mortal(digits, None)
    trainer(tmp_path / "dead", healthy, resume_from_checkpoint="latest", **options).train()
    trainer(tmp_path / "whole", healthy, **options).train()
    assert files(tmp_path / "whole/unet") == files(tmp_path / "dead/unet")
