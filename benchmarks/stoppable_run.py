"""A training run of tiny models that tells what it is about to do, and whose processes can be stopped at any moment.

What a run imports is imported here, once: every process is forked from the one that has done so.
"""

import os
import resource
import select
import signal
import socket
import time
import traceback

os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import datasets.distributed  # noqa: E402, F401
import timm  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import torchvision.utils  # noqa: E402, F401
from diffusers import DDIMPipeline, UNet2DModel  # noqa: E402, F401

import diffusers_rcfd  # noqa: E402
from tests.toys import tiny_classifier, tiny_teacher, tiny_unet  # noqa: E402

for public in diffusers_rcfd.__all__:
    getattr(diffusers_rcfd, public)  # is imported when asked for

STEPS = 24  # of a run, over all rungs
KEYBOARD_INTERRUPT = 3  # exit code of a process that SIGINT found outside the training loop
GRACE, PATIENCE = 10, 300  # seconds: for processes whose companion is gone; for a whole run


def build(job, folder):
    """A trainer of tiny models, with all that a resumed run has to put back."""
    trainer, processes, data = job
    torch.manual_seed(0)
    images = diffusers_rcfd.load_image_data(max_images=40, streaming=data == "streamed")
    options = {
        "output_dir": str(folder), "resume_from_checkpoint": "latest", "train_batch_size": 8 // processes,
        "learning_rate": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "ema_decay": 0.9, "random_flip": True,
        "max_train_steps": STEPS, "logging_steps": 3, "checkpointing_steps": 4, "sample_steps": 4,
        "num_sample_images": 4,
    }  # fmt: skip
    if trainer == "base":
        config = diffusers_rcfd.DiffusionConfig(**options, sample_inference_steps=2)
        return diffusers_rcfd.DiffusionTrainer(tiny_unet(dropout=0.1), diffusers_rcfd.RCFDScheduler(), config, images)
    if trainer == "classifier":
        config = diffusers_rcfd.ClassifierConfig(**options | {"random_crop_padding": 1})
        held_out = diffusers_rcfd.load_image_data(max_images=20, seed=1)
        return diffusers_rcfd.ClassifierTrainer(tiny_classifier(), config, images, held_out)
    if trainer == "sfd":  # two step counts, one optimizer step for each node; it needs no images
        own = {"student_steps": [2, 3], "teacher_steps": 2, "objective": "cfd", "l1_weight": 0.1}
        own |= {"gradient_accumulation_steps": 2, "train_batch_size": 4 // processes, "random_flip": False}
        config = diffusers_rcfd.SFDDistillationConfig(**options | own)
        return diffusers_rcfd.SFDDistillationTrainer(tiny_teacher(), tiny_classifier().eval(), config)
    ladder = {"student_steps": [4, 2, 1], "objective": ["pd", "cfd", "rcfd"], "max_train_steps": STEPS // 3}
    ladder |= {"gradient_accumulation_steps": 2, "train_batch_size": 4 // processes, "lr_warmup_steps": 1}
    config = diffusers_rcfd.CFDDistillationConfig(**options | ladder)
    return diffusers_rcfd.CFDDistillationTrainer(tiny_teacher(), tiny_classifier().eval(), config, images)


class Run:
    """The processes of a run, forked as a launcher would start them, and what the first of them has told."""

    def __init__(self, job, folder, disk=None):
        self.told, self.codes, self.began = [], {}, time.monotonic()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        self.pipe, end = os.pipe()
        self.pids = []
        for rank in range(job[1]):
            pid = os.fork()
            if pid == 0:
                os.close(self.pipe)
                if job[1] > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job[1]),
                                   "MASTER_ADDR": "localhost", "MASTER_PORT": port}  # fmt: skip
                os._exit(train(job, folder, end if rank == 0 else None, disk))
            self.pids.append(pid)
        os.close(end)

    def listen(self, seconds):
        """Take in what was told within a time; False once no one is left to tell."""
        if not select.select([self.pipe], [], [], seconds)[0]:
            return True
        received = os.read(self.pipe, 65536).decode()
        self.told += [(time.monotonic() - self.began, *line.split(" ", 1)) for line in received.splitlines()]
        return bool(received)

    def wait_for(self, event, count=1):
        """Wait until something was told for the count-th time; False if the run is over first."""
        while sum(name == event for _, name, _ in self.told) < count:
            if not self.listen(1.0) or time.monotonic() - self.began > PATIENCE:
                return False
        return True

    def stop(self, number, pids):
        """Send a signal to some of the processes, if they are still there."""
        for pid in pids:
            if not self._left(pid):
                os.kill(pid, number)

    def wait(self):
        """Wait for all processes, as a launcher does: when one failed, the others have not long."""
        last_call = self.began + PATIENCE
        while not all([self._left(pid) for pid in self.pids]):  # asks each, also after one that is there
            if any(self.codes.values()):
                last_call = min(last_call, time.monotonic() + GRACE)
            if time.monotonic() > last_call:
                self.stop(signal.SIGKILL, self.pids)
            self.listen(0.02)
        while self.listen(0):
            pass
        os.close(self.pipe)
        return [self.codes[pid] for pid in self.pids]

    def _left(self, pid):
        if pid not in self.codes:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return pid in self.codes

    def last(self, event):
        """The number that was told last under a name, or -1."""
        return max((int(value) for _, name, value in self.told if name == event), default=-1)

    def error(self):
        return next((value for _, name, value in self.told if name == "error"), "")


def train(job, folder, pipe, disk):
    """Train in this process, telling a pipe what it is about to do; the exit code."""
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def tell(event, value):
        if pipe is not None:
            os.write(pipe, f"{event} {value}\n".encode())

    try:
        trainer = build(job, folder)
        watch(trainer, tell, disk)
        trainer.train()
        return 0
    except SystemExit as left:
        return left.code
    except KeyboardInterrupt:
        return KEYBOARD_INTERRUPT
    except BaseException as error:
        traceback.print_exc()
        tell("error", f"{type(error).__name__}: {error}".replace("\n", " "))
        return 1


def watch(trainer, tell, disk):
    """Have a trainer tell of each step, checkpoint and end of a stage; from `disk`, files can grow no further."""
    train_step, save_checkpoint, end_stage = trainer._train_step, trainer._save_checkpoint, trainer._end_stage
    finish_stage = trainer.finish_stage

    def step(*args):
        tell("step", trainer.state.global_step)
        return train_step(*args)

    def save(sums):
        with full_disk(disk, "in a checkpoint", trainer.state.global_step):
            tell("writing", trainer.state.global_step)
            save_checkpoint(sums)
        tell("written", trainer.state.global_step)

    def end(stage):
        tell("ending", trainer.state.global_step)
        end_stage(stage)
        tell("ended", trainer.state.global_step)

    def finish(stage):
        with full_disk(disk, "in the save of a pipeline", trainer.state.global_step):
            finish_stage(stage)

    trainer._train_step, trainer._save_checkpoint, trainer._end_stage, trainer.finish_stage = step, save, end, finish


class full_disk:
    """From a step on, no file of some work grows beyond a size: writing fails as on a full disk."""

    def __init__(self, disk, work, step):
        self.size = disk["size"] if disk and disk["moment"] == work and step >= disk["step"] else None

    def __enter__(self):
        if self.size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def __exit__(self, *exception):
        if self.size is not None:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
