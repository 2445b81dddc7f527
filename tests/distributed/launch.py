"""Starts the ranks of a job as real processes, without paying for Megatron's imports each time.

A fork server imports the CPU device and Megatron once; every rank is forked from it, with an
environment and a process group of its own, and runs the real main program or a function of a test.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
MAIN_PROGRAM = REPOSITORY / "pretrain_gpt_prores.py"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.distributed.preload"])


@dataclass
class Job:
    """What a finished job left behind."""

    exit_codes: list[int | None]
    output: str
    directory: Path
    alphas: list[dict[int, dict[int, float]]] = field(default_factory=list)
    """Per rank: step -> layer -> the value of the layer's alpha tensor when the step ran."""

    @property
    def succeeded(self) -> bool:
        return all(code == 0 for code in self.exit_codes)

    @property
    def errors(self) -> list[str]:
        """The lines that say why the job ended."""
        return [line for line in self.output.splitlines() if line.startswith("error: ")]

    def events(self) -> Any:
        """Reads what the job wrote for TensorBoard."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.directory / "tensorboard"), {"scalars": 0})
        events.Reload()
        return events

    def scalars(self, tag: str) -> dict[int, float]:
        """Reads a TensorBoard scalar: iteration -> value, in the float32 that Megatron wrote."""
        return {event.step: event.value for event in self.events().Scalars(tag)}

    def tags(self) -> set[str]:
        return set(self.events().Tags()["scalars"])

    def layer_norms(self) -> dict[tuple[str, int], float]:
        """Reads what was measured of the layers: (tag, iteration) -> value."""
        events = self.events()
        return {
            (tag, event.step): event.value
            for tag in events.Tags()["scalars"]
            if "/layer_" in tag and not tag.startswith("prores/alpha/")
            for event in events.Scalars(tag)
        }

    def alphas_by_step(self) -> dict[int, dict[int, float]]:
        """Merges what all ranks held, step -> layer -> alpha; the ranks must not disagree."""
        merged: dict[int, dict[int, float]] = {}
        for rank in self.alphas:
            for step, held in rank.items():
                for layer, alpha in held.items():
                    assert merged.setdefault(step, {}).setdefault(layer, alpha) == alpha
        return {step: dict(sorted(held.items())) for step, held in merged.items()}


def _own_ports() -> Iterator[int]:
    """Lists the ports of this pytest worker, over and over, from a random one on."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first, count = 3000 + 1500 * (worker % 8), 1500
    start = random.randrange(count)
    return itertools.cycle(first + (start + number) % count for number in range(count))


_ports = _own_ports()


def free_port() -> int:
    """Gives a port that nothing listens on, for a process that is yet to start.

    Until that one listens, nobody else may take the port. So it is not one of those that the system
    gives to outgoing connections, nor one that another worker of these tests may be given.
    """
    while True:
        port = next(_ports)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def launcher_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Gives what torchrun sets for a rank, with all ranks on this node."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def fork(function: Callable[..., None], *args: Any) -> tuple[Any, Connection]:
    """Starts ``function(connection, *args)`` where Megatron is imported.

    Returns:
        The process, and this side's end of the connection.
    """
    ours, theirs = _context.Pipe()
    process = _context.Process(target=function, args=(theirs, *args))
    process.start()
    theirs.close()
    return process, ours


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    directory: str,
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(launcher_variables(rank, world_size, port))
    os.environ.update(OMP_NUM_THREADS="1", WANDB_MODE="offline")
    log = os.open(Path(directory, f"rank{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    torch.set_num_threads(1)
    _record_alphas(Path(directory, f"alphas{rank}.jsonl"))
    try:
        function(*args)
    except Exception:
        traceback.print_exc()
        raise


def _run_program(program: str, argv: Sequence[str], prepare: Callable[[], None] | None) -> None:
    sys.argv = [program, *argv]
    if prepare is not None:
        prepare()
    runpy.run_path(program, run_name="__main__")


def _record_alphas(path: Path) -> None:
    """Writes down what the layers of this rank really hold, each time that alpha was set."""
    from megatron_prores.training.prores_run import ProResRun

    stock = ProResRun.before_forward

    def before_forward(run: ProResRun, step: int) -> None:
        stock(run, step)
        assert run.warmup is not None
        held = {
            layer.prores_layer: layer.alpha.item() for chunk in run.warmup.chunks for layer in chunk
        }
        with path.open("a") as file:
            file.write(json.dumps([step, held]) + "\n")

    ProResRun.before_forward = before_forward  # type: ignore[method-assign]


def start_ranks(
    directory: Path, function: Callable[..., None], args: tuple[Any, ...], ranks: int
) -> list[Any]:
    """Starts ``function(*args)`` in each of ``ranks`` processes, and gives the processes."""
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [
        _context.Process(
            target=_rank_main, args=(rank, ranks, port, str(directory), function, args)
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def start_job(
    directory: Path,
    argv: Sequence[str],
    ranks: int,
    prepare: Callable[[], None] | None = None,
) -> list[Any]:
    """Starts the main program like :func:`run_job`, and leaves its processes to the caller."""
    argv = [*argv, "--tensorboard-dir", str(directory / "tensorboard")]
    return start_ranks(directory, _run_program, (str(MAIN_PROGRAM), argv, prepare), ranks)


def run_ranks(
    directory: Path,
    function: Callable[..., None],
    args: tuple[Any, ...] = (),
    ranks: int = 1,
    timeout: float = 240.0,
) -> Job:
    """Calls ``function(*args)`` in each of ``ranks`` processes and waits for all of them.

    Args:
        directory: Where logs and scalars go.
        function: Top-level, as it is pickled by name.
        args: Its arguments.
        ranks: World size.
        timeout: Seconds, after which all ranks are killed; the test then sees exit code None.
    """
    processes = start_ranks(directory, function, args, ranks)
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        # Like torchrun: one failed rank ends the others.
        if any(process.exitcode not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + 10.0)
        time.sleep(0.05)
    exit_codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    output = "".join((directory / f"rank{rank}.log").read_text() for rank in range(ranks))
    return Job(exit_codes, output, directory, [_read(directory, rank) for rank in range(ranks)])


def run_job(
    directory: Path,
    argv: Sequence[str],
    ranks: int = 1,
    program: Path = MAIN_PROGRAM,
    prepare: Callable[[], None] | None = None,
    timeout: float = 240.0,
) -> Job:
    """Runs the main program, or another, on ``ranks`` processes.

    Args:
        directory: Where logs and scalars go.
        argv: Its command line; TensorBoard is added.
        ranks: World size.
        program: The program to run.
        prepare: Called in each rank before the program, to plant a fault.
        timeout: As in :func:`run_ranks`.
    """
    argv = [*argv, "--tensorboard-dir", str(directory / "tensorboard")]
    return run_ranks(directory, _run_program, (str(program), argv, prepare), ranks, timeout)


type Check = tuple[Callable[..., None], tuple[Any, ...]]
"""A function that runs in a rank and its arguments; both are pickled."""


def check_name(check: Check) -> str:
    function, args = check
    return " ".join([function.__name__, *map(str, args)])


def run_checks(directory: Path, checks: Sequence[Check]) -> dict[str, str]:
    """Runs checks one after the other in one rank.

    A check leaves nothing behind: what it replaces, it puts back.

    Returns:
        Name of the check -> its traceback, where it failed.
    """
    job = run_ranks(directory, _run_each, (checks, str(directory / "failures.json")))
    assert job.succeeded, job.output[-3000:]
    failures: dict[str, str] = json.loads((directory / "failures.json").read_text())
    return failures


def _run_each(checks: Sequence[Check], path: str) -> None:
    failures = {}
    for check in checks:
        function, args = check
        try:
            function(*args)
        except Exception:
            failures[check_name(check)] = traceback.format_exc()
    Path(path).write_text(json.dumps(failures))


def _read(directory: Path, rank: int) -> dict[int, dict[int, float]]:
    recorded: dict[int, dict[int, float]] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (directory / f"alphas{rank}.jsonl").read_text().splitlines():
            step, held = json.loads(line)
            recorded[step] = {int(layer): alpha for layer, alpha in held.items()}
    return recorded
