"""Heartbeats between the launchers of a job's nodes, so that a lost node ends the job.

torchrun's launchers meet once, at the start. Later on a node whose ranks have died, or whose cable
is out, is only noticed by the ranks of the others, each of them waiting in a collective until
Megatron's ``--distributed-timeout-minutes`` are over, and none can say what it waited for. Here
every launcher sends the others heartbeats through torchrun's own store, on node 0, and in the end
its exit code. Nothing of it runs in the ranks.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, TCPStore

from megatron_prores.errors import EXIT_INTERRUPTED, print_own_error

_HEARTBEAT_SECONDS = 2.0

_SUSPECT_SECONDS = 5 * _HEARTBEAT_SECONDS
"""Seconds of silence after which a node is mentioned when this node's ranks have failed."""

_GRACE_SECONDS = 10.0
"""Seconds that this node's ranks have to end by themselves when another node's have failed: they
often know a better reason."""

_FAREWELL_SECONDS = 2.5 * _HEARTBEAT_SECONDS
"""Seconds that a failed node takes to tell the others how it ended."""


def _ended_well(code: int) -> bool:
    return code in (0, EXIT_INTERRUPTED)


@dataclass(frozen=True)
class Job:
    """Who meets where, as torchrun's flags say."""

    node: int
    """Number of this node, from 0."""
    nodes: int
    address: str
    port: int
    run_id: str
    wait_seconds: float
    """How long the nodes wait for each other at the start."""
    silent_seconds: float
    """How long a node may be silent later on."""


@dataclass
class _Other:
    """What is known of another node."""

    host: str = ""
    beat: str = ""
    heard: float = 0.0
    """When its last new heartbeat came, by this node's clock."""
    code: int | None = None
    """Its exit code, once it has ended."""

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return self.code is not None and not _ended_well(self.code)

    def silence(self) -> float:
        """Return the seconds since it was heard; 0 for a node that has ended, or has not come."""
        return time.monotonic() - self.heard if self.host and self.code is None else 0.0


class Nodes:
    """The other nodes, as seen from this one."""

    def __init__(self, job: Job, end_ranks: Callable[[], None]) -> None:
        """Take the job, and what kills the ranks of this node, if there are any."""
        self.job = job
        self.end_ranks = end_ranks
        self.others = {node: _Other() for node in range(job.nodes) if node != job.node}
        self.this = f"node {job.node} ({socket.gethostname()})"
        self.met = False
        """Whether all nodes have been here."""
        self.code: int | None = None
        """The exit code, once this node is being ended because of another."""
        self._store: PrefixStore | None = None
        self._answered = time.monotonic()
        """When the store last answered; it is on node 0."""
        self._gone: float | None = None
        """Since when there is no store: the launcher of node 0 has ended."""
        self._failed: float | None = None
        """Since when a node is known to have failed."""
        self._ended = threading.Event()
        """The ranks of this node have ended: nothing is left to watch over."""
        self._closed = threading.Event()
        """Nothing is left to tell either."""

    def start(self) -> None:
        """Start the threads that exchange heartbeats and watch them, beside the launcher."""
        for function in (self._exchange, self._watch):
            threading.Thread(target=function, daemon=True, name=function.__name__).start()

    def close(self, code: int) -> None:
        """Tell the others how this node has ended; node 0, which has the store, waits for them.

        Args:
            code: The launcher's exit code.
        """
        self._ended.set()
        if self._store is None or self._gone is not None:
            return
        # In a thread: the store may be behind a dead cable.
        farewell = threading.Thread(target=self._say_ended, args=(code,), daemon=True)
        farewell.start()
        farewell.join(_FAREWELL_SECONDS)
        if self.job.node == 0 and self.met:
            patience = self.job.silent_seconds if _ended_well(code) else _FAREWELL_SECONDS
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and any(
                other.code is None and other.silence() < patience for other in self.others.values()
            ):
                time.sleep(_HEARTBEAT_SECONDS / 10)
        self._closed.set()

    def _say_ended(self, code: int) -> None:
        with suppress(RuntimeError):
            assert self._store is not None
            self._store.set(f"ended/{self.job.node}", str(code))

    def _exchange(self) -> None:
        """Exchange heartbeats until the end. May hang where the network does."""
        me, beats = json.dumps([socket.gethostname(), secrets.token_hex(8)]), 0
        timeout = self.job.wait_seconds
        while not self._closed.is_set():
            try:
                self._store = self._connect(timeout)
                self._register(me)
                while not self._closed.wait(_HEARTBEAT_SECONDS if beats else 0):
                    beats += 1
                    self._store.set(f"beat/{self.job.node}", str(beats))
                    self._listen()
                    self._answered, self._gone = time.monotonic(), None
            except RuntimeError:  # torch's DistError, and what else its stores raise
                self._gone = self._gone or time.monotonic()
                if not self.met:
                    return  # torchrun's own meeting fails for the same reason
                timeout = _GRACE_SECONDS

    def _connect(self, timeout: float) -> PrefixStore:
        """Return torchrun's store; on node 0 it lives as long as torchrun or this needs it."""
        store = TCPStore(
            self.job.address,
            self.job.port,
            is_master=self.job.node == 0,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
        return PrefixStore(f"prores-nodes/{self.job.run_id}", store)

    def _register(self, me: str) -> None:
        assert self._store is not None
        there = self._store.compare_set(f"node/{self.job.node}", "", me).decode()
        if there != me:
            self._end(
                f"{self.this}: {json.loads(there)[0]} is node {self.job.node} already; give each "
                "node another --node-rank (NODE_RANK)",
                code=2,
            )

    def _listen(self) -> None:
        """Read the heartbeats: node 0 those of each node, the others what node 0 has found."""
        assert self._store is not None
        if self.job.node == 0:
            for node, other in self.others.items():
                self._ask(node, other)
            known = {node: (o.host, o.silence(), o.code) for node, o in self.others.items()}
            self._store.set("others", json.dumps(known))
        elif self._store.check(["others"]):
            now = time.monotonic()
            self.others[0].host, self.others[0].heard = self._host_of(0), now
            if self._store.check(["ended/0"]):
                self.others[0].code = int(self._store.get("ended/0"))
            for node, (host, silence, code) in json.loads(self._store.get("others")).items():
                if int(node) != self.job.node:
                    self.others[int(node)] = _Other(host, "", now - silence, code)
        self.met = self.met or all(other.host for other in self.others.values())

    def _ask(self, node: int, other: _Other) -> None:
        store, now = self._store, time.monotonic()
        assert store is not None
        if not store.check([f"beat/{node}"]):
            return
        if not other.host:
            other.host = self._host_of(node)
        if (beat := store.get(f"beat/{node}").decode()) != other.beat:
            other.beat, other.heard = beat, now
        if store.check([f"ended/{node}"]):
            other.code = int(store.get(f"ended/{node}"))

    def _host_of(self, node: int) -> str:
        assert self._store is not None
        return str(json.loads(self._store.get(f"node/{node}"))[0])

    def _watch(self) -> None:
        """End this node when it waits for another in vain."""
        while not self._ended.wait(_HEARTBEAT_SECONDS / 2):
            if self._failed is None and any(other.failed for other in self.others.values()):
                self._failed = time.monotonic()
            failed = self._failed is not None and time.monotonic() - self._failed > _GRACE_SECONDS
            gone = self._gone is not None and time.monotonic() - self._gone > _GRACE_SECONDS
            if gone and self.job.node != 0 and self.others[0].code is not None:
                gone = False  # it went in order
            if failed or (self.met and (gone or self.lost(self.job.silent_seconds))):
                self._end(self._words("its ranks were ended"))

    def lost(self, seconds: float) -> dict[int, float]:
        """Return the nodes that have been silent for longer than ``seconds``, and for how long."""
        if self._gone is not None:
            return {}
        if self.job.node != 0 and (silence := time.monotonic() - self._answered) > seconds:
            # Nothing is known of any other without node 0.
            return {0: silence}
        silences = {node: other.silence() for node, other in self.others.items()}
        return {node: silence for node, silence in silences.items() if silence > seconds}

    def _words(self, consequence: str) -> str:
        reasons = [
            f"node {node} ({other.host}) ended with exit code {other.code}"
            for node, other in self.others.items()
            if other.failed
        ]
        reasons += [
            f"node {node} ({self.others[node].host}) has not been heard of for {silence:.0f} s "
            "(machine or network)"
            for node, silence in self.lost(min(_SUSPECT_SECONDS, self.job.silent_seconds)).items()
        ]
        if not reasons and self._gone is not None and self.met:
            reasons.append(f"the launcher of node 0 ({self.others[0].host}) is gone")
        return f"{self.this}: {consequence}: {'; '.join(reasons)}" if reasons else ""

    def explain_failure(self, code: int) -> str:
        """Say what other nodes have to do with the failure of this one; empty where none has."""
        if not self.met:
            return ""
        return self._words(f"its ranks failed (exit code {code})")

    def explain_meeting(self, error: DistError) -> str:
        """Say in one line why the nodes did not come together.

        Args:
            error: What torchrun's store ended with.
        """
        job = self.job
        place = f"--master-addr {job.address} --master-port {job.port}"
        if self.met:
            return (
                f"{self.this}: torchrun has lost its store on node 0: {str(error).splitlines()[0]}"
            )
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            return (
                f"{self.this}: port {job.port} is in use on this host: give another --master-port "
                "(MASTER_PORT), the same on all nodes"
            )
        missing = [str(node) for node, other in self.others.items() if not other.host]
        waited = f"within {job.wait_seconds:.0f} s"
        if job.node == 0 and missing:
            came = job.nodes - len(missing)
            return (
                f"{self.this}: {came} of {job.nodes} nodes came {waited}; not there: node "
                f"{', '.join(missing)}. Is the launcher running there, with {place}?"
            )
        return (
            f"{self.this}: node 0 did not answer at {place} {waited}, or not all of {job.nodes} "
            "nodes came: is that its address, is its launcher running, is the port open?"
        )

    def _end(self, words: str, code: int = 1) -> None:
        """End the launcher from beside it: it may be in a call that no signal interrupts."""
        if self._ended.is_set():
            return
        self.code = code
        print_own_error(words)
        self.end_ranks()
        self.close(code)
        sys.stdout.flush()
        os._exit(code)
