"""One model over two hosts: two network namespaces of this machine, joined by a wire."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.distributed.launch import run_job
from tests.examples.clone import REPOSITORY
from tests.examples.test_published_runs import SHRUNK, dry_run, user_environment
from tests.examples.wire import Wire

# Ends in iteration 100000, in effect never: signals and the cable end it.
RUN = {
    **SHRUNK,
    "GPUS_PER_NODE": "1",
    "PP": "2",
    "TRAIN_ITERS": "100000",
    "SAVE_INTERVAL": "100000",
    "EVAL_INTERVAL": "100000",
}
COMPARED = 5
"""Iterations whose losses are compared with those of one host."""


@dataclass
class Hosts:
    """Two hosts, "alpha" with node 0 and "beta" with node 1."""

    wire: Wire
    directory: Path

    NAMES = ("alpha", "beta")

    def start(self, node: int, log: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
        """Starts a script on a host, as its user would."""
        script = str(REPOSITORY / "examples/pretrain_130m.sh")
        command = ["ip", "netns", "exec", self.wire.names[node], "unshare", "--uts", "bash", "-c"]
        command += [f'hostname {self.NAMES[node]}; exec bash "$@"', "bash", script, *words]
        nodes = {"NNODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": Wire.ADDRESSES[0]}
        nodes |= variables
        with log.open("w") as file:
            return subprocess.Popen(
                command, env=user_environment(**nodes), stdout=file, stderr=file
            )


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    for program in ("ip", "unshare", "hostname"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} command here (Debian: iproute2, util-linux, hostname)")
    pair = Hosts(Wire(f"pr{os.getpid() % 1000000}n"), tmp_path_factory.mktemp("hosts"))
    try:
        pair.wire.connect()
    except OSError as error:
        pair.wire.disconnect()
        pytest.skip(f"no network namespaces here: {error}")
    yield pair
    pair.wire.disconnect()


def wait_for(pattern: str, log: Path, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 240
    while not re.search(pattern, log.read_text()):
        assert all(process.poll() is None for process in processes), log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)


def losses(log: str) -> list[tuple[str, str]]:
    return re.findall(r"iteration +(\d+)/.* lm loss: (\S+) ", log)


def end_all(processes: list[subprocess.Popen[str]]) -> None:
    """Kills what a failed test has left: launchers, and ranks by their process groups."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def test_one_model_over_two_hosts_then_a_host_is_cut_off(hosts: Hosts) -> None:
    run = hosts.directory / "run"
    logs = [hosts.directory / f"{name}.log" for name in hosts.NAMES]
    variables = {**RUN, "RUN_DIR": str(run), "LOG_ID": "first"}

    started = [hosts.start(node, logs[node], "post", **variables) for node in (0, 1)]
    try:
        # The last stage, which prints losses, is on beta. A signal to one host is for all.
        wait_for(rf"iteration +{COMPARED}/", logs[1], started)
        started[1].send_signal(signal.SIGUSR1)
        assert [process.wait(120) for process in started] == [75, 75]
    finally:
        end_all(started)
    assert "node 0 of 2 (alpha)" in logs[0].read_text()
    assert "node 1 of 2 (beta)" in logs[1].read_text()
    over_two = losses(logs[1].read_text())
    assert (run / "logs/first/rank0.log").exists()
    assert losses((run / "logs/first/rank1.log").read_text()) == over_two
    saved = int((run / "checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert saved >= COMPARED

    # The same ranks on one host.
    alone = {**RUN, "GPUS_PER_NODE": "2", "RUN_DIR": str(hosts.directory / "alone")}
    flags = dry_run("pretrain_130m.sh", "post", **alone)[1]
    job = run_job(hosts.directory / "job", [*flags, "--exit-interval", str(COMPARED)], ranks=2)
    assert job.succeeded, job.output[-3000:]
    assert losses(job.output) == over_two[:COMPARED]

    variables |= {"LOG_ID": "second", "SILENT_NODE_SECONDS": "10"}
    started = [hosts.start(node, logs[node], "post", **variables) for node in (0, 1)]
    try:
        wait_for(rf"iteration +{saved + 2}/", logs[1], started)
        hosts.wire.set(cut=True)
        cut = time.monotonic()
        assert [process.wait(90) for process in started] == [1, 1]
        assert time.monotonic() - cut > 8
    finally:
        hosts.wire.set()
        end_all(started)
    for node, other in ((0, 1), (1, 0)):
        (words,) = re.findall(r"^error: .*", logs[node].read_text(), flags=re.MULTILINE)
        assert words.startswith(f"error: node {node} ({hosts.NAMES[node]}): its ranks were ended: ")
        assert f"node {other} ({hosts.NAMES[other]}) has not been heard of for 1" in words
    assert f"resuming at iteration {saved} of 100000" in logs[0].read_text()


@dataclass(frozen=True)
class Weather:
    """What the network does for a while."""

    name: str
    seconds: float
    both: dict[str, float]
    """Of both directions."""
    only: dict[str, float] = field(default_factory=dict)
    """Of the direction from beta to alpha, where it differs."""

    def begin(self, wire: Wire) -> None:
        wire.set(**self.both)
        for name, value in self.only.items():
            setattr(wire.ways[1], name, value)


PASSING = [
    Weather("500 ms delay", 20, {"delay": 0.5}),
    Weather("30% loss", 20, {"loss": 0.3}),
    Weather("30% loss in one direction", 20, {}, {"loss": 0.3}),
    Weather("cut", 10, {"cut": True}),
    Weather("cut in one direction", 10, {}, {"cut": True}),
]
SILENT = 40
"""Seconds after which a node is given up, far above those of PASSING; below torch's 10 minutes."""


def test_bad_weather_does_not_harm_a_run(hosts: Hosts, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--long"):
        pytest.skip("takes minutes: --long")
    logs = [hosts.directory / f"weather-{name}.log" for name in hosts.NAMES]
    run = hosts.directory / "weather"
    variables = {**RUN, "RUN_DIR": str(run), "LOG_ID": "one", "SILENT_NODE_SECONDS": str(SILENT)}
    started = [hosts.start(node, logs[node], "post", **variables) for node in (0, 1)]
    told = []

    def iterations() -> int:
        return len(losses(logs[1].read_text()))

    try:
        wait_for(r"iteration +3/", logs[1], started)
        for weather in PASSING:
            before = iterations()
            weather.begin(hosts.wire)
            time.sleep(weather.seconds)
            during = iterations() - before
            hosts.wire.set()
            cleared = time.monotonic()
            reached = iterations() + 3
            wait_for(rf"iteration +{reached}/", logs[1], started)
            recovery = time.monotonic() - cleared
            told.append(
                f"{weather.name}, {weather.seconds:g} s: {during} iterations meanwhile, three "
                f"more {recovery:.1f} s after it"
            )
        compared = min(iterations(), 40)
        Weather("cut for good", 0, {}, {"cut": True}).begin(hosts.wire)
        cut = time.monotonic()
        assert [process.wait(3 * SILENT) for process in started] == [1, 1]
        told.append(
            f"cut in one direction for good: both ended after {time.monotonic() - cut:.0f} s"
        )
    finally:
        hosts.wire.set()
        end_all(started)
        print("\n".join(told))
    for node in (0, 1):
        (words,) = re.findall(r"^error: .*", logs[node].read_text(), flags=re.MULTILINE)
        assert words.startswith(f"error: node {node} ({hosts.NAMES[node]}): its ranks were ended: ")
    alone = {**RUN, "GPUS_PER_NODE": "2", "RUN_DIR": str(hosts.directory / "weather-alone")}
    flags = dry_run("pretrain_130m.sh", "post", **alone)[1]
    job = run_job(hosts.directory / "fair", [*flags, "--exit-interval", str(compared)], ranks=2)
    assert job.succeeded, job.output[-3000:]
    assert losses(job.output) == losses(logs[1].read_text())[:compared]
