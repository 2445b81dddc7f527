"""A wire between two network namespaces of this machine, which can be cut, slow, or lose packets.

Two TUN devices, and a thread that carries each packet from one to the other. (The kernel's own
``tc netem`` is not in every kernel.)
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import subprocess
import threading
import time
from dataclasses import dataclass

_TUNSETIFF = 0x400454CA
_TUN_WITHOUT_HEADER = 0x0001 | 0x1000


def ip(*words: str) -> None:
    result = subprocess.run(["ip", *words], capture_output=True, text=True)
    if result.returncode:
        raise OSError(f"ip {' '.join(words)}: {result.stderr.strip()}")


@dataclass
class Direction:
    """What happens to packets that go one way; may be changed at any time."""

    cut: bool = False
    loss: float = 0.0
    """Share of packets that are lost."""
    delay: float = 0.0
    """Seconds."""


class Wire:
    """Joins two namespaces, which it makes."""

    ADDRESSES = ("10.213.7.1", "10.213.7.2")

    def __init__(self, prefix: str) -> None:
        """Take a prefix of the names of the namespaces."""
        self.names = (f"{prefix}0", f"{prefix}1")
        self.ways = (Direction(), Direction())
        """Of packets from namespace 0, and of those from namespace 1."""
        self._stop = threading.Event()
        self._ends: list[int] = []
        self._carrier = threading.Thread(target=self._carry, daemon=True)

    def connect(self) -> None:
        """Make namespaces and devices, and carry packets.

        Raises:
            OSError: That cannot be done here.
        """
        for name, address in zip(self.names, self.ADDRESSES, strict=True):
            ip("netns", "add", name)
            self._ends.append(_open_device(name))
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "wire", "up", "mtu", "1400")
        self._carrier.start()

    def disconnect(self) -> None:
        """Take away all that was made."""
        self._stop.set()
        if self._carrier.is_alive():
            self._carrier.join()
        for end in self._ends:
            os.close(end)
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def set(self, **both: float) -> None:
        """Make both directions like this, and else as new."""
        for way in self.ways:
            way.__init__(**both)  # type: ignore[misc]

    def _carry(self) -> None:
        draw = random.Random(0)
        number = itertools.count()
        waiting: list[tuple[float, int, int, bytes]] = []  # due, order, to which end, packet
        while not self._stop.is_set():
            rest = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.2
            for end in select.select(self._ends, [], [], min(rest, 0.2))[0]:
                packet = os.read(end, 65536)
                source = self._ends.index(end)
                way = self.ways[source]
                if not way.cut and draw.random() >= way.loss:
                    due = time.monotonic() + way.delay
                    heapq.heappush(waiting, (due, next(number), 1 - source, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(waiting)
                os.write(self._ends[target], packet)


def _open_device(namespace: str) -> int:
    """Make a device in a namespace; what is written to the file comes out of it there."""
    opened: list[int | OSError] = []

    def within() -> None:  # a thread has a namespace of its own
        try:
            with open(f"/run/netns/{namespace}") as there:
                os.setns(there.fileno(), os.CLONE_NEWNET)
            device = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"wire", _TUN_WITHOUT_HEADER))
            opened.append(device)
        except OSError as error:
            opened.append(error)

    thread = threading.Thread(target=within)
    thread.start()
    thread.join()
    if isinstance(opened[0], OSError):
        raise opened[0]
    return opened[0]
