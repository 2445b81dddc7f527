"""The command: run the checks, print the report, and say what is missing of --need."""

from __future__ import annotations

import argparse
import json
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_prores.doctor import machine, packages
from megatron_prores.doctor.facts import MISSING, Check, Facts, Finding, gather
from megatron_prores.errors import Parser, UserError

SECTIONS: dict[str, dict[str, Check]] = {
    "Python and packages": packages.CHECKS,
    "Accelerated kernels": packages.ACCELERATORS,
    "GPUs": machine.GPUS,
    "Machine": machine.MACHINE,
}

CPU = (
    *("Python", "torch", "megatron-core", "dataset helper", "numpy", "sentencepiece"),
    *("tensorboard", "psutil", "disk"),
)
GPU = (*CPU, "GPU", "shared memory")

NEEDS: dict[str, tuple[str, ...]] = {
    "cpu": CPU,
    "gpu": GPU,
    "te": ("Transformer Engine",),
    "apex": ("Apex",),
    "flash-attn": ("flash-attn",),
    "fp8": (*GPU, "Transformer Engine", "FP8"),
    "mxfp8": (*GPU, "Transformer Engine", "MXFP8"),
    "network": ("RDMA",),
    "wandb": ("wandb",),
}
"""What --need asks for: findings none of which may be MISSING."""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m megatron_prores.doctor",
        description="Check what is installed, what is missing, and what that costs. Changes "
        "nothing. Exit code: 0 ready for --need, 1 something of it is missing, 2 wrong use.",
        epilog="For more about the machine: python -m torch.utils.collect_env, nvidia-smi topo -m, "
        "and NCCL_DEBUG=INFO in a run.",
    )
    needs = f"What a script needs, joined by commas: {', '.join(NEEDS)}. Default: cpu."
    save = "Where checkpoints are to go. Default: the current directory."
    parser.add_argument("--need", default="cpu", metavar="LIST", help=needs)
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    parser.add_argument("--quiet", action="store_true", help="Print only what is missing.")
    parser.add_argument("--save", type=Path, default=Path(), metavar="DIRECTORY", help=save)
    return parser


Report = dict[str, dict[str, Finding]]
"""The findings by section and name."""


def run_check(check: Check, facts: Facts) -> Finding:
    """Run a check. A check that fails is a finding too: the others must still be printed."""
    try:
        return check(facts)
    except Exception as error:
        message = " ".join(str(error).split())
        return Finding(MISSING, f"the check failed: {type(error).__name__}: {message}")


def lacking(report: Report, needs: Sequence[str]) -> list[str]:
    """Return a line for each thing that is needed and missing."""
    findings = {name: each for section in report.values() for name, each in section.items()}
    wanted = {name: (need, findings[name]) for need in needs for name in NEEDS[need]}
    return [
        f"{need}: {name}: {each.value}" + (f" ({each.cost})" if each.cost else "")
        for name, (need, each) in wanted.items()
        if each.status == MISSING
    ]


def _as_text(report: Report) -> str:
    width = max(len(name) for section in report.values() for name in section)
    lines = [socket.gethostname()]
    for section, findings in report.items():
        lines.append(f"\n{section}")
        for name, each in findings.items():
            lines.append(f"  {each.status:<8} {name:<{width}}  {each.value}")
            if each.cost:
                lines.append(f"{'':<{width + 13}}-> {each.cost}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    Raises:
        UserError: A flag is wrong.
    """
    args = _parser().parse_args(argv)
    needs = [each.strip() for each in args.need.split(",") if each.strip()]
    for need in needs:
        if need not in NEEDS:
            raise UserError(f"--need {need}: unknown; known are {', '.join(NEEDS)}")
    if not needs:
        raise UserError(f"--need is empty: give some of {', '.join(NEEDS)}")
    if args.save.exists() and not args.save.is_dir():
        raise UserError(f"--save {args.save}: is a file, and must be a directory")
    facts = gather(args.save)
    report = {
        section: {name: run_check(check, facts) for name, check in checks.items()}
        for section, checks in SECTIONS.items()
    }
    missing = lacking(report, needs)
    if args.json:
        content = {"needs": needs, "ready": not missing, "lacking": missing, "findings": report}
        print(json.dumps(content, indent=2, default=asdict))
        return 1 if missing else 0
    if not args.quiet:
        print(_as_text(report) + "\n")
    for line in missing:
        print(f"MISSING for {line}")
    if not missing and not args.quiet:
        print(f"Ready for {', '.join(needs)}.")
    return 1 if missing else 0
