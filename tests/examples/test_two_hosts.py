"""One model over two hosts: two network namespaces of this machine, joined by a cable (veth)."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.launch import run_job
from tests.examples.clone import REPOSITORY
from tests.examples.test_published_runs import SHRUNK, dry_run, user_environment

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


def ip(*words: str) -> None:
    result = subprocess.run(["ip", *words], capture_output=True, text=True)
    if result.returncode:
        raise OSError(f"ip {' '.join(words)}: {result.stderr.strip()}")


@dataclass
class Hosts:
    """Two hosts, "alpha" with node 0 and "beta" with node 1."""

    prefix: str
    directory: Path

    ADDRESSES = ("10.213.7.1", "10.213.7.2")
    NAMES = ("alpha", "beta")

    def connect(self) -> None:
        ends = [f"{self.prefix}{node}" for node in (0, 1)]
        for end in ends:
            ip("netns", "add", end)
        peer = ["peer", "name", ends[1], "netns", ends[1]]
        ip("link", "add", ends[0], "netns", ends[0], "type", "veth", *peer)
        for end, address in zip(ends, self.ADDRESSES, strict=True):
            ip("-n", end, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", end, "link", "set", "lo", "up")
            ip("-n", end, "link", "set", end, "up")

    def disconnect(self) -> None:
        for node in (0, 1):
            subprocess.run(["ip", "netns", "delete", f"{self.prefix}{node}"], capture_output=True)

    def cable(self, state: str) -> None:
        ip("-n", f"{self.prefix}1", "link", "set", f"{self.prefix}1", state)

    def start(self, node: int, log: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
        """Starts a script on a host, as its user would."""
        script = str(REPOSITORY / "examples/pretrain_130m.sh")
        command = ["ip", "netns", "exec", f"{self.prefix}{node}", "unshare", "--uts", "bash", "-c"]
        command += [f'hostname {self.NAMES[node]}; exec bash "$@"', "bash", script, *words]
        nodes = {"NNODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": self.ADDRESSES[0]}
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
    pair = Hosts(f"pr{os.getpid() % 1000000}n", tmp_path_factory.mktemp("hosts"))
    try:
        pair.connect()
    except OSError as error:
        pair.disconnect()
        pytest.skip(f"no network namespaces here: {error}")
    yield pair
    pair.disconnect()


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
        hosts.cable("down")
        cut = time.monotonic()
        assert [process.wait(90) for process in started] == [1, 1]
        assert time.monotonic() - cut > 8
    finally:
        hosts.cable("up")
        end_all(started)
    for node, other in ((0, 1), (1, 0)):
        (words,) = re.findall(r"^error: .*", logs[node].read_text(), flags=re.MULTILINE)
        assert words.startswith(f"error: node {node} ({hosts.NAMES[node]}): its ranks were ended: ")
        assert f"node {other} ({hosts.NAMES[other]}) has not been heard of for 1" in words
    assert f"resuming at iteration {saved} of 100000" in logs[0].read_text()
