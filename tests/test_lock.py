"""One run at a time in a folder."""

import json
import os
import signal
import socket

import pytest

from diffusers_rcfd import DiffusionConfig, DiffusionTrainer, RCFDScheduler, load_image_data
from diffusers_rcfd.trainers import lock
from diffusers_rcfd.trainers.lock import LOCK_FILE, lock_folder
from tests.toys import tiny_unet


def hold_in_another_process(folder, fork_again=False):
    """The number of a process that holds the lock of a folder, and that of one it forked, if it did."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with lock_folder(folder):
            worker = os.fork() if fork_again else 0
            if not fork_again or worker:
                os.write(writer, json.dumps(worker).encode())
            signal.pause()
        os._exit(1)
    return pid, json.loads(os.read(reader, 64))


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_second_run_is_told_who_holds_the_folder_until_that_process_dies(tmp_path):
    holder, _ = hold_in_another_process(tmp_path)
    try:
        with pytest.raises(ValueError, match=f"is in use by process {holder} on {socket.gethostname()} since 20"):
            with lock_folder(tmp_path):
                pass
    finally:
        kill(holder)
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not any(tmp_path.iterdir())


def test_worker_that_outlives_the_holder_does_not_keep_the_lock(tmp_path):
    holder, worker = hold_in_another_process(tmp_path, fork_again=True)
    kill(holder)
    try:
        with lock_folder(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_processes_that_a_launcher_started_apart_are_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    with lock_folder(tmp_path):
        monkeypatch.setenv("SLURM_PROCID", "1")
        with pytest.raises(ValueError, match="by one launcher, which did not tell them of each other.*torchrun"):
            with lock_folder(tmp_path):
                pass


@pytest.mark.parametrize("locks", [True, False])
def test_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, monkeypatch, locks):
    """Also where the file system has no locks: then the file alone says who holds the folder."""
    if not locks:
        monkeypatch.setattr(lock, "fcntl", None)
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    holder = {"host": socket.gethostname(), "pid": gone, "began": 7}
    (tmp_path / LOCK_FILE).write_text(json.dumps(holder))
    with lock_folder(tmp_path):
        if not locks:
            with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
                with lock_folder(tmp_path):
                    pass
    assert not any(tmp_path.iterdir())


def test_lock_of_another_host_without_locks_of_the_system_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    (tmp_path / LOCK_FILE).write_text(json.dumps({"host": "elsewhere", "pid": 1, "began": 7}))
    with pytest.raises(ValueError, match="in use by process 1 on elsewhere"):
        with lock_folder(tmp_path):
            pass
    assert (tmp_path / LOCK_FILE).exists()


def test_two_starts_at_once_are_one_run(tmp_path):
    """A second trainer starts in a step of the first: it is refused, and the first goes on to its end."""
    digits, refusals = load_image_data(max_images=32), []

    def trainer(**options):
        options = {"max_train_steps": 2, "train_batch_size": 4, "lr_warmup_steps": 0, "ema_decay": 0.0} | options
        return DiffusionTrainer(tiny_unet(), RCFDScheduler(), DiffusionConfig(str(tmp_path), **options), digits)

    first = trainer()
    compute_loss = first.compute_loss

    def start_another(*args):
        for options in ({}, {"resume_from_checkpoint": "latest"}, {"overwrite_output_dir": True}):
            with pytest.raises(ValueError, match="`output_dir` must be free, .* in use by process") as refusal:
                trainer(**options).train()
            refusals.append(refusal)
        return compute_loss(*args)

    first.compute_loss = start_another
    first.train()
    assert len(refusals) == 6
    assert (tmp_path / "model_index.json").is_file() and not (tmp_path / LOCK_FILE).exists()
