"""Leaving in good order: signals that ask a run to stop are obeyed between two steps, by all processes together."""

import os
import signal
import threading
import time

import torch
from accelerate import Accelerator
from torch import distributed as dist

ECHO_SECONDS = 1.0


class Interruption:
    """Note SIGTERM and SIGINT within this context, for the training loop to obey; a second one is obeyed at once.

    A launcher passes on a signal that the cluster or terminal sent to each process as well: one that comes within
    `ECHO_SECONDS` of the first is the same request. Signals are noted in the main thread alone, as Python allows.

    Attributes: `signal`, the number of the signal that was noted, or 0.
    """

    def __init__(self):
        self.signal = 0
        self._since = 0.0
        self._process = os.getpid()
        self._earlier = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
            if hasattr(signal, "SIGCHLD"):
                self._earlier[signal.SIGCHLD] = signal.getsignal(signal.SIGCHLD)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame) -> None:
        if os.getpid() != self._process:  # a worker of the data loader, which the loop ends
            if number == signal.SIGTERM:
                raise SystemExit(128 + number)
        elif not self.signal:
            self.signal = number
            self._since = time.monotonic()
        elif time.monotonic() - self._since > ECHO_SECONDS:
            raise SystemExit(128 + number)

    def notice_dead_workers_late(self) -> None:
        """Let a data loader notice a dead worker when it waits for it, not in the middle of a step."""
        if signal.SIGTERM in self._earlier and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def host_group(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """Group of all processes that talks through the host, so that no GPU is waited for; None for a single one."""
    return dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None


def largest_of_all(value: int, group: dist.ProcessGroup | None) -> int:
    """The largest value that any process has."""
    if group is None:
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return int(largest)
