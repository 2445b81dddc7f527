"""Starts the main program on the GPU, several runs at a time: they are small, and start slowly."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tests.distributed.launch import REPOSITORY, Job, _read, free_port

AT_A_TIME = 3
"""On the GPU, however many workers of pytest share it."""

VARIABLES = {
    "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}",
    "PYTHONWARNINGS": "ignore",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Each would start a compiler per core, and as many processes that hold memory of the GPU.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    **dict.fromkeys(("RANK", "LOCAL_RANK"), "0"),
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1"),
    "MASTER_ADDR": "127.0.0.1",
}
"""Of a job of one rank."""


class Jobs:
    """Training runs by name, each started once and waited for by those that ask."""

    def __init__(self, root: Path) -> None:
        """Takes the directory that all of them write to."""
        self.root = root
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        self._pool = ThreadPoolExecutor(max(1, AT_A_TIME // workers))
        self._futures: dict[str, Future[Job]] = {}
        self._lock = threading.Lock()

    def start(self, name: str, line: str, environment: Mapping[str, str] | None = None) -> None:
        """Starts a run unless it is started already."""
        with self._lock:
            if name not in self._futures:
                directory = self.root / f"{len(self._futures)}"
                self._futures[name] = self._pool.submit(
                    run_on_gpu, directory, line.split(), environment or {}
                )

    def __call__(self, name: str, line: str, environment: Mapping[str, str] | None = None) -> Job:
        """Gives a finished run, which must have succeeded."""
        self.start(name, line, environment)
        job = self._futures[name].result()
        assert job.succeeded, f"{name}: {job.output[-4000:]}"
        return job


def run_on_gpu(directory: Path, argv: list[str], environment: Mapping[str, str]) -> Job:
    """Runs the main program on one GPU in a process of its own, and records its alphas.

    Args:
        directory: Where log, scalars and alphas go.
        argv: Its command line; TensorBoard is added.
        environment: Beside this process's.
    """
    directory.mkdir(parents=True)
    variables = os.environ | VARIABLES | {"MASTER_PORT": str(free_port())} | environment
    argv = [*argv, "--tensorboard-dir", str(directory / "tensorboard")]
    command = [sys.executable, "-m", "tests.gpu.record", str(directory), *argv]
    with open(directory / "log", "w") as log:
        process = subprocess.run(
            command, env=variables, stdout=log, stderr=subprocess.STDOUT, timeout=500
        )
    output = (directory / "log").read_text()
    return Job([process.returncode], output, directory, [_read(directory, 0)])
