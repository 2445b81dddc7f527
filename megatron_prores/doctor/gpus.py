"""Checks of the GPUs: as the driver sees them, and as torch does."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_prores.doctor.finding import MISSING, NOTE, OK, Check, Finding, Where, one_line
from megatron_prores.doctor.packages import TRANSFORMER_ENGINE, load_torch

_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap")


@dataclass(frozen=True)
class Gpu:
    """A GPU, as nvidia-smi tells."""

    name: str
    memory_mib: float
    """0 where the GPU has none of its own."""
    driver: str
    capability: tuple[int, int]
    """Compute capability, (9, 0) for an H100; (0, 0) where it is not told."""

    def __str__(self) -> str:
        memory = f", {self.memory_mib / 1024:.0f} GiB" if self.memory_mib else ""
        return f"{self.name}{memory}, compute capability {'.'.join(map(str, self.capability))}"


def gpus(where: Where) -> list[Gpu]:
    """List the GPUs of this machine, as nvidia-smi sees them."""
    found = []
    for line in (where.run(*_QUERY, "--format=csv,noheader,nounits") or "").splitlines():
        fields = [each.strip() for each in line.split(",")]
        if len(fields) == 4:
            found.append(Gpu(fields[0], _number(fields[1]), fields[2], _capability(fields[3])))
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0  # "[N/A]"


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def gpu(where: Where) -> Finding:
    """The GPUs, and whether torch can use them."""
    found = gpus(where)
    value = ", ".join(f"{n} x {each}" for each, n in Counter(map(str, found)).items())
    cpu_only = "--device cpu is what is left"
    torch = load_torch()
    if isinstance(torch, Exception):
        return Finding(MISSING, value or "none", "torch cannot be imported")
    if torch.version.cuda is None:
        return Finding(MISSING, value or "none", f"this torch is for CPUs only; {cpu_only}")
    visible = where.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        value = value or f"{count} x {torch.cuda.get_device_name(0)}"
        if found and count != len(found):
            return Finding(NOTE, f"{value}; torch uses {count}", f"CUDA_VISIBLE_DEVICES={visible}")
        return Finding(OK, value)
    if not found:
        return Finding(MISSING, "none", f"no NVIDIA driver, or no GPU; {cpu_only}")
    if visible is not None and not visible.strip("-1, "):
        return Finding(MISSING, value, f"CUDA_VISIBLE_DEVICES={visible} hides them")
    try:
        torch.cuda.init()
        reason = "torch.cuda.is_available() is false"
    except Exception as error:
        reason = one_line(error)
    return Finding(MISSING, value, f"torch cannot use them: {reason}")


def driver(where: Where) -> Finding:
    """The driver; one too old for torch's CUDA shows in the finding on the GPU."""
    versions = sorted({each.driver for each in gpus(where)})
    if not versions:
        return Finding(MISSING, "nvidia-smi shows none", "no GPU can be used")
    return Finding(OK, ", ".join(versions))


def _capabilities(where: Where) -> list[tuple[int, int]]:
    """The compute capabilities of the GPUs, where torch can use them."""
    torch = load_torch()
    if isinstance(torch, Exception) or not torch.cuda.is_available():
        return []
    # Asked of nvidia-smi first: torch would have to be started on the GPUs.
    told = [each.capability for each in gpus(where) if each.capability > (0, 0)]
    return told or [torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count())]


def _low_precision(where: Where, lowest: tuple[int, int], below: tuple[int, int]) -> Finding:
    """Transformer Engine's own conditions, as in its pytorch/quantization.py, version 2.20."""
    capabilities = _capabilities(where)
    cost = "train in bf16"
    if not capabilities:
        return Finding(MISSING, "no GPU", cost)
    if not all(lowest <= each < below for each in capabilities):
        has = ", ".join(sorted({f"{major}.{minor}" for major, minor in capabilities}))
        wants = f"{lowest[0]}.{lowest[1]}" + (f" to below {below[0]}" if below < _ANY else "")
        return Finding(MISSING, f"compute capability {has}, {wants} is needed", cost)
    if TRANSFORMER_ENGINE(where).status != OK:
        return Finding(MISSING, "the GPU can, but there is no Transformer Engine", cost)
    return Finding(OK, "the GPU and Transformer Engine can")


_ANY = (99, 0)


def fp8(where: Where) -> Finding:
    """FP8 with a scale per tensor."""
    return _low_precision(where, (8, 9), _ANY)


def mxfp8(where: Where) -> Finding:
    """FP8 with a scale per block of 32 values."""
    return _low_precision(where, (10, 0), (12, 0))


CHECKS: dict[str, Check] = {"GPU": gpu, "driver": driver, "FP8": fp8, "MXFP8": mxfp8}
