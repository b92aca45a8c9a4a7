"""Processes of this machine that work on the jobs of a batch, one on each device or several on the CPU."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Protocol

import torch

from ..vit.devices import pick_device
from .job import Job, Outcome, run_job

ATTEMPTS = 3
"""How often a job is begun whose process dies."""


class Workers(Protocol):
    """What works on jobs, here or elsewhere."""

    @property
    def has_room(self) -> bool:
        """Whether another job can be given."""

    @property
    def is_busy(self) -> bool:
        """Whether a job is worked on."""

    def give(self, job: Job) -> None:
        """Gives a job, where there is room."""

    def wait(self) -> Iterator[tuple[Job, Outcome]]:
        """Waits until a job is done, and yields those that are."""

    def close(self) -> None:
        """Ends what is worked on."""


def pick_devices(name: str) -> list[str]:
    """The devices that a name stands for: "auto" is every GPU of this machine, or the CPU where it has none.

    Raises:
        SpliceError: No such device in this machine.
    """
    device = pick_device(name)
    if name == "auto" and device.type == "cuda":
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [str(device)]


class Processes:
    """Worker processes, each with a job at a time; one that dies is replaced, and its job is begun again.

    Args:
        devices: Where the processes compute, one for each entry.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        on_cpu = devices.count("cpu")
        threads = max(1, torch.get_num_threads() // on_cpu) if on_cpu else None
        self._workers = [_Worker(device, threads) for device in devices]

    @property
    def has_room(self) -> bool:
        return any(worker.job is None for worker in self._workers)

    @property
    def is_busy(self) -> bool:
        return any(worker.job is not None for worker in self._workers)

    def give(self, job: Job) -> None:
        next(worker for worker in self._workers if worker.job is None).give(job)

    def wait(self) -> Iterator[tuple[Job, Outcome]]:
        busy = {worker.connection: worker for worker in self._workers if worker.job is not None}
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            worker, job = busy[connection], busy[connection].job
            assert job is not None
            if (outcome := worker.collect()) is not None:
                yield job, outcome

    def close(self) -> None:
        for worker in self._workers:
            worker.end()


class _Worker:
    """A process on a device; it starts with its first job.

    Attributes:
        job: What it works on, or None.
        connection: To it, where it has started.
    """

    def __init__(self, device: str, threads: int | None) -> None:
        self.device, self.threads = device, threads
        self.job: Job | None = None
        self.attempts = 0
        self.connection: Connection
        self.process: multiprocessing.context.SpawnProcess | None = None

    def give(self, job: Job) -> None:
        self.job, self.attempts = replace(job, vit=replace(job.vit, device=self.device)), 0
        self._begin()

    def collect(self) -> Outcome | None:
        """The outcome of the job, or None where its process has died and it is begun again."""
        assert self.process is not None
        try:
            outcome: Outcome = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            status = self.process.exitcode
            self.end()
            if self.attempts < ATTEMPTS:
                self._begin()
                return None
            outcome = Outcome(
                error=f"its process died {ATTEMPTS} times (exit status {status}), mostly of too little memory: give "
                "the row a smaller size, or shrink its structure picture"
            )
        self.job = None
        return outcome

    def end(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.join()
            self.connection.close()
            self.process = None

    def _begin(self) -> None:
        self.attempts += 1
        if self.process is None:
            context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs, self.threads), daemon=True)
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process, which ends the other
            try:
                self.process.start()
            finally:
                signal.signal(signal.SIGINT, before)
            theirs.close()  # so that the end of the process is the end of the connection
        with suppress(OSError):  # it has died: `collect` finds that out
            self.connection.send(self.job)


def _serve(connection: Connection, threads: int | None) -> None:
    """Works on jobs as they come, until the process that gives them has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it was not handed on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)
    while True:
        connection.send(run_job(connection.recv()))


def _end_with_parent() -> None:
    """Ends this process with the one that has started it, also where that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
