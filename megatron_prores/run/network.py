"""The network interface by which the nodes of a job reach each other."""

from __future__ import annotations

import socket

import psutil  # type: ignore[import-untyped]


def interface_to(address: str, port: int) -> str | None:
    """Names the network interface by which this host reaches ``address``, or has it itself.

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
