"""One run at a time in a folder: a lock that dies with the process that holds it."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = "run.lock"
# What launchers call a process's number: Slurm's `srun`, Open MPI, MPICH and `torchrun`.
RANK_VARIABLES = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "RANK")

held: set[int] = set()  # descriptors of the locks of this process


@contextmanager
def lock_folder(folder: Path, accelerator: Accelerator | None = None) -> Iterator[None]:
    """Hold a folder, so that a second run in it is refused; all processes of one launch share the main one's lock.

    The lock is of the operating system (`flock`, which network file systems pass on to their server), so that it ends
    with the process, however that ends. Where there is none, the file itself is the lock: one left by a process of
    this host that is gone is taken over, one of another host has to be deleted by hand.

    Args:
        folder (`Path`): made if it is missing.
        accelerator (`Accelerator`, *optional*): of the processes that share the lock; this process alone by default.

    Raises:
        ValueError: on all processes, if another run holds the folder; the message tells which.
    """
    descriptor, trouble = None, [None]
    if accelerator is None or accelerator.is_main_process:
        try:
            descriptor = _acquire(folder)
        except (BlockingIOError, FileExistsError) as error:
            trouble = [str(error)]
    if accelerator is not None and accelerator.num_processes > 1:
        broadcast_object_list(trouble)
    if trouble[0] is not None:
        raise ValueError(trouble[0])
    try:
        yield
    finally:
        if descriptor is not None:
            _release(folder, descriptor)


def _acquire(folder: Path) -> int:
    """Take the lock; its file descriptor. `BlockingIOError` where another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    while True:
        new = not path.exists()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_EXCL if new else 0), 0o644)
        free = _lock(descriptor, path, new)
        if free and path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            break
        os.close(descriptor)
        if not free:
            raise BlockingIOError(_refusal(folder, _read_holder(path)))
        # Else its holder has just deleted the file: once more.
    held.add(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(_describe_process()).encode())
    return descriptor


def _lock(descriptor: int, path: Path, new: bool) -> bool:
    """Whether the lock of an open file, which this process has made if it is `new`, is now this process's."""
    try:
        if fcntl is None:
            raise OSError("no flock")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks: the file says who holds it
        holder = _read_holder(path)
        return new or (holder is not None and _has_ended(holder))


def _release(folder: Path, descriptor: int) -> None:
    held.discard(descriptor)
    with suppress(OSError):
        (folder / LOCK_FILE).unlink()
    os.close(descriptor)


def _close_inherited() -> None:
    """In a process that was forked from the holder, such as a worker of a data loader, which may outlive it."""
    for descriptor in held:
        os.close(descriptor)
    held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def _describe_process() -> dict[str, int | str | None]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "parent": os.getppid(),
        "began": _start_of(pid),
        "rank": _launcher_rank(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _read_holder(path: Path) -> dict | None:
    """What the holder of a lock wrote into it; None where it has not yet."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return holder if isinstance(holder, dict) and {"host", "pid"} <= holder.keys() else None
    except (ValueError, OSError):
        return None


def _has_ended(holder: dict) -> bool:
    """Whether a process of this host is gone; of another host that cannot be told."""
    return holder["host"] == socket.gethostname() and _start_of(holder["pid"]) != holder.get("began")


def _start_of(pid: int) -> int | str | None:
    """When a process began, which tells it from a later one of the same number; None if there is none."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError):
        return None
    return "running"


def _launcher_rank() -> str | None:
    return next((f"{name}={os.environ[name]}" for name in RANK_VARIABLES if name in os.environ), None)


def _refusal(folder: Path, holder: dict | None) -> str:
    """Why a folder cannot be had."""
    who = "another process" if holder is None else f"process {holder['pid']} on {holder['host']}"
    since = f" since {holder['since']}" if holder and "since" in holder else ""
    message = f"`output_dir` must be free, {str(folder)!r} is in use by {who}{since}"
    here = _describe_process()
    siblings = holder and (holder["host"], holder.get("parent")) == (here["host"], here["parent"])
    ranks = holder and holder.get("rank") and here["rank"] and holder["rank"] != here["rank"]
    if siblings or ranks:
        message += (
            ": both were started by one launcher, which did not tell them of each other. Start them with "
            "`accelerate launch` or `torchrun`, as one run of several processes"
        )
    return f"{message}. Wait for its end, or choose another folder."
