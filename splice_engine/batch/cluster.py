"""A Ray cluster that works on the jobs of a batch: Ray places them, begins them again where a machine is lost."""

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..errors import SpliceError, pip_command
from .job import Job, Outcome, run_job

RETRIES = 2
"""How often Ray begins a job again whose process or machine has died."""

AHEAD = 2
"""Jobs given for each that can be worked on, so that none waits for its pictures."""

POLL_SECONDS = 10
"""Without a result, after which the head is asked whether it is there."""

PROBE_SECONDS = 30
"""Within which a cluster answers."""

PROBE = "import ray, sys; ray.init(sys.argv[1], logging_level='CRITICAL', log_to_driver=False)"

QUICK = {"RAY_gcs_rpc_server_reconnect_timeout_s": "3", "RAY_gcs_rpc_server_connect_timeout_s": "3"}
"""Ray's settings for the probe: where nobody answers, Ray waits for minutes and then ends its process."""

ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0"}


class Cluster:
    """The machines of a Ray cluster. A job takes a GPU, or a CPU where the cluster has no GPU.

    Args:
        address: Of the cluster's head, host:port, or "auto" for the cluster that this machine belongs to.

    Raises:
        SpliceError: Ray is not installed, no cluster answers, or it has nothing to work with.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise SpliceError(f"--ray needs a package that is not installed: {pip_command('ray')}") from None
        os.environ.update(ENVIRONMENT)
        _probe(address)
        self._ray: Any = ray
        ray.init(address, logging_level="ERROR", log_to_driver=False)
        self._head: str = ray.get_runtime_context().gcs_address
        self._kind = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
        options = {"num_gpus": 1, "num_cpus": 0} if self._kind == "GPU" else {"num_cpus": 1}
        # max_calls=0: a process keeps its backbone from job to job, also on a GPU.
        self._task = ray.remote(max_retries=RETRIES, max_calls=0, **options)(_run_job)
        self._jobs: dict[Any, Job] = {}
        if not self._slots:
            self.close()
            raise SpliceError(f"the Ray cluster at {address} has no CPU to work with: start a worker (`ray start`)")

    @property
    def _slots(self) -> int:
        """Jobs that the cluster can work on now; machines come and go."""
        self._check_head()  # where it is gone, Ray would wait for its answer and then end this process
        return int(self._ray.cluster_resources().get(self._kind, 0))

    @property
    def has_room(self) -> bool:
        return len(self._jobs) < max(1, AHEAD * self._slots)

    @property
    def is_busy(self) -> bool:
        return bool(self._jobs)

    def give(self, job: Job) -> None:
        self._jobs[self._task.remote(job)] = job

    def wait(self) -> Iterator[tuple[Job, Outcome]]:
        done: list[Any] = []
        while not done:
            done, _ = self._ray.wait(list(self._jobs), timeout=POLL_SECONDS)
            if not done:
                self._check_head()
        yield self._jobs.pop(done[0]), self._outcome(done[0])

    def close(self) -> None:
        self._ray.shutdown()

    def _check_head(self) -> None:
        """Raises a SpliceError where the head is gone: Ray itself waits for results that never come."""
        if not _listens(self._head):
            raise SpliceError(
                f"the head of the Ray cluster at {self._head} is gone: start it and its workers again, and run the "
                "same command, which goes on"
            )

    def _outcome(self, reference: Any) -> Outcome:
        errors = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(reference)
            return outcome
        except errors.RayTaskError as error:  # `run_job` raises nothing: it could not be called
            reason = " ".join(str(error.cause).split())[:200]
            return Outcome(
                error=f"a machine of the Ray cluster cannot run this engine ({reason}): install the same version there",
                ends_batch=True,
            )
        except errors.RayError as error:
            reason = str(error).partition("\n")[0]
            return Outcome(
                error=f"Ray has given it up ({reason[:200]}): give the row a smaller size, shrink its structure "
                "picture, or run the command again"
            )


def _run_job(job: Job) -> Outcome:
    """`run_job`, which tells the machine where all jobs would fail."""
    outcome = run_job(job)
    return replace(outcome, error=f"on {platform.node()}: {outcome.error}") if outcome.ends_batch else outcome


def _listens(address: str) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), POLL_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def _probe(address: str) -> None:
    """Raises a SpliceError where no cluster answers: asked by another process, since Ray would end this one."""
    if address == "auto" or _listens(address):
        command = [sys.executable, "-c", PROBE, address]
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True}
        with suppress(subprocess.TimeoutExpired):
            if not subprocess.run(command, env={**os.environ, **QUICK}, timeout=PROBE_SECONDS, **options).returncode:
                return
    raise SpliceError(
        f"no Ray cluster answers at {address} that this machine belongs to: start one (`ray start --head`), join it "
        "(`ray start --address HOST:PORT`), or check the address"
    )
