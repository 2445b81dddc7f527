"""Checks of what connects the nodes: InfiniBand, host names, and the variables that steer NCCL."""

from __future__ import annotations

import contextlib
import ipaddress
import resource
import socket
import threading

from megatron_prores.doctor.finding import MISSING, NOTE, OK, Check, Finding, Where, gib
from megatron_prores.doctor.gpus import gpus

_SHOWN = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_", "OMPI_MCA_btl", "NVSHMEM_", "SHARP_")
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")

_SLOW = {
    "NCCL_IB_DISABLE": "NCCL leaves InfiniBand alone and takes TCP: slow between nodes",
    "NCCL_P2P_DISABLE": "no NVLink and no PCIe peer to peer between the GPUs of a node: slow",
    "NCCL_SHM_DISABLE": "GPUs without NVLink talk through the network: slow",
}


def rdma(where: Where) -> Finding:
    """InfiniBand or RoCE adapters with a port that is up."""
    devices = where.names("sys/class/infiniband")
    tcp = "NCCL takes TCP between nodes: slow; one node needs none"
    if not devices:
        return Finding(MISSING, "no InfiniBand or RoCE adapter", tcp)
    active = []
    for device in devices:
        for port in where.names(f"sys/class/infiniband/{device}/ports"):
            base = f"sys/class/infiniband/{device}/ports/{port}"
            if (where.read(f"{base}/state") or "").endswith("ACTIVE"):
                layer = where.read(f"{base}/link_layer") or "link"
                rate = (where.read(f"{base}/rate") or "rate unknown").partition(" (")[0]
                active.append(f"{device}:{port} {layer} {rate}")
    if not active:
        return Finding(MISSING, f"no port is up: {', '.join(devices)}", tcp)
    if not any(each.startswith("uverbs") for each in where.names("dev/infiniband")):
        cost = f"a container needs --device /dev/infiniband, the host its driver; {tcp}"
        return Finding(MISSING, f"{', '.join(active)}, but no /dev/infiniband/uverbs*", cost)
    return Finding(OK, ", ".join(active))


def gpu_direct(where: Where) -> Finding:
    """Whether adapters can read and write the memory of GPUs."""
    if not gpus(where) or not where.names("sys/class/infiniband"):
        return Finding(NOTE, "no GPU or no RDMA adapter")
    if (where.root / "sys/module/nvidia_peermem").exists():
        return Finding(OK, "nvidia_peermem is loaded")
    return Finding(
        NOTE,
        "nvidia_peermem is not loaded",
        "NCCL needs it, or DMA-BUF: its log of NCCL_DEBUG=INFO says GDRDMA where it is used",
    )


def locked_memory(where: Where) -> Finding:
    """How much memory may be locked, which adapters need to be told where it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding(OK, "unlimited")
    more = "ulimit -l unlimited" if hard == resource.RLIM_INFINITY else "--ulimit memlock=-1"
    return Finding(
        MISSING if where.names("sys/class/infiniband") else NOTE,
        gib(soft),
        f"NCCL cannot register memory with InfiniBand: {more} (docker), LimitMEMLOCK (systemd)",
    )


def open_files(where: Where) -> Finding:
    """How many files may be open: sockets of NCCL and gloo, and data files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= 4096:
        return Finding(OK, "unlimited" if soft == resource.RLIM_INFINITY else str(soft))
    return Finding(NOTE, str(soft), "many ranks need many sockets: ulimit -n 65536")


def variables(where: Where) -> Finding:
    """The variables that steer the communication; none whose name says that it is secret."""
    shown = {
        name: "(set)" if any(word in name for word in _SECRET) else value
        for name, value in sorted(where.environ.items())
        if name.startswith(_SHOWN)
    }
    value = ", ".join(f"{name}={text}" for name, text in shown.items()) or "none set"
    costs = [f"{name}: {cost}" for name, cost in _SLOW.items() if where.environ.get(name) == "1"]
    if where.environ.get("NCCL_DEBUG", "").upper() in ("INFO", "TRACE"):
        costs.append("NCCL_DEBUG: every rank writes a long log")
    return Finding(NOTE if costs else OK, value, "; ".join(costs))


def interfaces(where: Where) -> Finding:
    """Whether the network interfaces that variables name are there."""
    present = where.names("sys/class/net")
    value = ", ".join(present) or "none"
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        text = where.environ.get(variable, "")
        # NCCL: names begin so; ^ leaves out, = means the whole name.
        wanted = text.lstrip("=").split(",") if text and not text.startswith("^") else []
        if wanted and not any(name.startswith(each) for each in wanted if each for name in present):
            cost = f"{variable}={text} names none of them: the ranks cannot connect"
            return Finding(MISSING, value, cost)
    return Finding(OK, value)


LOOKUP_SECONDS = 3.0


def _addresses(host: str) -> list[str] | None:
    """Resolve a name; None where it cannot be, or take too long."""
    found: list[str] = []

    def look() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            found.extend({str(each[4][0]) for each in socket.getaddrinfo(host, None)})

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(LOOKUP_SECONDS)
    return sorted(found) or None


def host_name(where: Where) -> Finding:
    """Whether this machine can find itself by its name, as gloo does."""
    name = socket.gethostname()
    addresses = _addresses(name)
    if addresses is None:
        cost = "gloo cannot tell its address: set GLOO_SOCKET_IFNAME, or put the name in /etc/hosts"
        return Finding(NOTE, f"{name} has no address", cost)
    return Finding(OK, f"{name} is {', '.join(addresses)}")


def master(where: Where) -> Finding:
    """Whether MASTER_ADDR can be found, where it is set."""
    address = where.environ.get("MASTER_ADDR")
    if not address:
        return Finding(OK, "not set: a run of one node needs none")
    addresses = _addresses(address)
    if addresses is None:
        return Finding(MISSING, f"{address} has no address", "the nodes cannot meet")
    several = where.environ.get("NNODES", where.environ.get("SLURM_NNODES", "1")) not in ("", "1")
    if several and all(
        ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in addresses
    ):
        cost = "the other nodes cannot reach a loopback address"
        return Finding(MISSING, f"{address} is {', '.join(addresses)}", cost)
    return Finding(OK, f"{address} is {', '.join(addresses)}")


def connections(where: Where) -> Finding:
    """The variable that Megatron insists on for tensor parallelism before Blackwell."""
    value = where.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if value == "1":
        return Finding(OK, "1")
    return Finding(
        NOTE,
        value or "not set",
        "tensor and context parallelism want 1 on Hopper and older; examples/ set it",
    )


CHECKS: dict[str, Check] = {
    "RDMA": rdma,
    "GPUDirect RDMA": gpu_direct,
    "locked memory": locked_memory,
    "open files": open_files,
    "variables": variables,
    "CUDA_DEVICE_MAX_CONNECTIONS": connections,
    "interfaces": interfaces,
    "host name": host_name,
    "MASTER_ADDR": master,
}
