"""A lost node ends the job on all nodes: real launchers with ranks that only wait or fail."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_prores.errors import run_program
from megatron_prores.launch import main as launch
from megatron_prores.launch import nodes
from tests.distributed.launch import free_port, start_ranks

HOST = socket.gethostname()

WAITS = "echo $BASHPID >rank$RANK.pid; exec sleep 300"


@dataclass
class Launcher:
    process: Any
    log: Path

    def end(self, seconds: float = 90.0) -> tuple[int, list[str]]:
        """Its exit code, and the lines with which it says why."""
        self.process.join(seconds)
        lines = re.findall(r"^error: .*", self.log.read_text(), flags=re.MULTILINE)
        return self.process.exitcode, lines


def launch_node(argv: list[str], directory: str, grace: float) -> None:
    """As ``python -m megatron_prores.launch``, in a process that has imported torch already."""
    os.chdir(directory)
    nodes._GRACE_SECONDS = grace
    run_program(lambda: launch.main(argv))


@contextmanager
def launchers(
    directory: Path,
    *ranks: str,
    numbers: tuple[int, ...] = (0, 1),
    per_node: tuple[int, ...] = (1, 1, 1),
    wait: int = 60,
    silent: float | str = 60,
    port: int | None = None,
    grace: float = 4.0,
) -> Iterator[list[Launcher]]:
    """Starts a launcher per node, whose ranks, by default one, run a line of shell."""
    port = port or free_port()
    started = []
    for start, (node, rank) in enumerate(zip(numbers, ranks, strict=True)):
        argv = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", str(per_node[start])]
        argv += ["--rdzv-backend", "static", "--master-addr", "127.0.0.1"]
        argv += ["--master-port", str(port), "--rdzv-id", "test", "--rdzv-conf", f"timeout={wait}"]
        argv += ["--silent-node-seconds", str(silent), "--no-python", "bash", "-c", rank]
        log = directory / f"launcher{start}"
        (process,) = start_ranks(log, launch_node, (argv, str(directory), grace), ranks=1)
        started.append(Launcher(process, log / "rank0.log"))
    try:
        yield started
    finally:
        for launcher in started:
            launcher.process.kill()
            launcher.process.join()
        for pid in directory.glob("*.pid"):  # ranks outlive a launcher that was killed
            with suppress(ProcessLookupError, ValueError):
                os.kill(int(pid.read_text()), signal.SIGKILL)


def wait_for_ranks(directory: Path, ranks: int = 2) -> None:
    deadline = time.monotonic() + 60
    while len([file for file in directory.glob("*.pid") if file.read_text()]) < ranks:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(3)  # so that each launcher has heard of the other


def is_alive(directory: Path, rank: int) -> bool:
    pid = int((directory / f"rank{rank}.pid").read_text())
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("failing", [0, 1])
def test_a_node_whose_rank_fails_ends_the_other(failing: int, tmp_path: Path) -> None:
    ranks = [WAITS, WAITS]
    ranks[failing] = "echo $BASHPID >rank$RANK.pid; sleep 4; exit 9"
    with launchers(tmp_path, *ranks) as started:
        wait_for_ranks(tmp_path)
        ends = [launcher.end() for launcher in started]
    assert ends[failing] == (9, [])
    code, words = ends[1 - failing]
    assert code == 1
    (line,) = words
    assert f"node {failing} ({HOST}) ended with exit code 9" in line
    assert line.startswith(f"error: node {1 - failing} ({HOST}): its ranks were ended")
    assert not is_alive(tmp_path, 1 - failing)


def test_a_signal_does_not_hide_the_code_of_ranks_that_fail(tmp_path: Path) -> None:
    # As srun's, which ends all nodes with the first that fails.
    fails = "echo $BASHPID >rank$RANK.pid; sleep 5; exit 9"
    knows_why = """
        trap '[[ $LOCAL_RANK != 0 ]] || exit 2' TERM
        echo $BASHPID >rank$RANK.pid
        while :; do sleep 0.1; done
    """
    with launchers(tmp_path, fails, knows_why, per_node=(1, 2), grace=60) as started:
        wait_for_ranks(tmp_path, ranks=3)
        while is_alive(tmp_path, 0):
            time.sleep(0.05)
        time.sleep(1)  # node 0 now waits for what node 1 has to say
        for launcher in started:
            os.kill(launcher.process.pid, signal.SIGTERM)
        assert [launcher.end() for launcher in started] == [(9, []), (2, [])]


@pytest.mark.parametrize(
    ("frozen", "words"),
    [(1, r"node 1 \(.*\) has not been heard of for \d+ s"), (0, r"node 0 \(.*\) has not been")],
)
def test_a_node_that_falls_silent_ends_the_other(frozen: int, words: str, tmp_path: Path) -> None:
    with launchers(tmp_path, WAITS, WAITS, silent=5) as started:
        wait_for_ranks(tmp_path)
        os.kill(started[frozen].process.pid, signal.SIGSTOP)
        code, lines = started[1 - frozen].end()
    assert code == 1
    (line,) = lines
    assert re.search(words, line)
    assert not is_alive(tmp_path, 1 - frozen)


def test_a_launcher_of_node_0_that_was_killed_ends_the_other(tmp_path: Path) -> None:
    with launchers(tmp_path, WAITS, WAITS) as started:
        wait_for_ranks(tmp_path)
        started[0].process.kill()
        code, lines = started[1].end()
    assert code == 1
    (line,) = lines
    assert f"the launcher of node 0 ({HOST}) is gone" in line


def test_nodes_that_end_well_say_nothing(tmp_path: Path) -> None:
    # Node 1 takes longer, by more than the time after which a node counts as silent.
    with launchers(tmp_path, "exit 0", "sleep 8", silent=5) as started:
        ends = [launcher.end() for launcher in started]
    assert ends == [(0, []), (0, [])]


@pytest.mark.parametrize("slow", [0, 1])
def test_a_signal_lets_all_ranks_save_however_long_one_takes(slow: int, tmp_path: Path) -> None:
    ranks = [
        f"trap 'sleep {seconds}; exit 75' USR1; echo $BASHPID >rank$RANK.pid; "
        "while :; do sleep 0.1; done"
        for seconds in ((9, 0) if slow == 0 else (0, 9))
    ]
    with launchers(tmp_path, *ranks, silent=20) as started:
        wait_for_ranks(tmp_path)
        for launcher in started:
            os.kill(launcher.process.pid, signal.SIGUSR1)
        ends = [launcher.end() for launcher in started]
    assert ends == [(75, []), (75, [])]


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (0, "1 of 2 nodes came within 5 s; not there: node 1"),
        (1, "node 0 did not answer at --master-addr 127.0.0.1"),
    ],
)
def test_a_node_that_never_comes_is_named(node: int, words: str, tmp_path: Path) -> None:
    with launchers(tmp_path, WAITS, numbers=(node,), wait=5) as (launcher,):
        code, (line,) = launcher.end()
    assert code == 1
    assert words in line
    assert not list(tmp_path.glob("*.pid"))


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with launchers(tmp_path, WAITS, numbers=(0,), port=port) as (launcher,):
            code, (line,) = launcher.end()
    assert code == 1
    assert f"port {port} is in use on this host" in line


def test_two_nodes_of_one_number_are_refused(tmp_path: Path) -> None:
    with launchers(tmp_path, WAITS, WAITS, WAITS, numbers=(0, 1, 1), wait=60) as started:
        ends = sorted(launcher.end() for launcher in started)
    assert [code for code, _ in ends] == [1, 1, 2]
    assert f"{HOST} is node 1 already; give each node another --node-rank" in ends[-1][1][0]


@pytest.mark.parametrize(
    ("silent", "words"), [(0, "--silent-node-seconds 0: must be"), ("long", "invalid float value")]
)
def test_a_wrong_time_is_refused(silent: float | str, words: str, tmp_path: Path) -> None:
    with launchers(tmp_path, WAITS, numbers=(0,), silent=silent) as (launcher,):
        code, (line,) = launcher.end()
    assert code == 2
    assert words in line
    assert "--silent-node-seconds" in line
