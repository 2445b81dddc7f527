"""By which interface the nodes of a job reach each other; and a job of one process."""

from __future__ import annotations

import os
import socket

import psutil  # type: ignore[import-untyped]


def interface_to(address: str, port: int) -> str | None:
    """Name the network interface by which this host reaches ``address``, or has it itself.

    Gloo, which Megatron uses beside NCCL, else takes the one that the host's own name stands for,
    which on many hosts is the loopback.

    Returns:
        Its name; None where it cannot be told, or is the loopback.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address, port, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)  # sends nothing
            here = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if here in {each.address for each in addresses}:
            return None if name == "lo" else name
    return None


def set_single_process_env() -> None:
    """Make this process a job of its own, as torchrun would: rank 0 of 1, on a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
