"""The program: runs the checks, prints the report, and judges what was asked for."""

from __future__ import annotations

import argparse
import json
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_prores.doctor import fabric, gpus, machine, packages
from megatron_prores.doctor.finding import MISSING, Check, Finding, Where, examine
from megatron_prores.errors import Parser, UserError

SECTIONS: dict[str, dict[str, Check]] = {
    "Python and packages": packages.CHECKS,
    "Accelerated kernels": packages.ACCELERATORS,
    "GPUs": gpus.CHECKS,
    "Network": fabric.CHECKS,
    "Machine": machine.CHECKS,
}

CPU = (
    *("Python", "torch", "megatron-core", "dataset helper", "numpy", "sentencepiece"),
    *("tensorboard", "psutil", "disk"),
)
GPU = (*CPU, "GPU", "driver", "NCCL", "shared memory")

NEEDS: dict[str, tuple[str, ...]] = {
    "cpu": CPU,
    "gpu": GPU,
    "te": ("Transformer Engine",),
    "apex": ("Apex",),
    "flash-attn": ("flash-attn",),
    "fp8": (*GPU, "Transformer Engine", "FP8"),
    "mxfp8": (*GPU, "Transformer Engine", "MXFP8"),
    "network": ("RDMA", "locked memory", "interfaces", "MASTER_ADDR"),
    "wandb": ("wandb",),
}
"""What --need asks for: findings none of which may be MISSING."""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m megatron_prores.doctor",
        description="Tells what is installed, what is missing, and what that costs. Changes "
        "nothing. Exit code: 0 ready for --need, 1 something of it is missing, 2 wrong use.",
    )
    parser.add_argument(
        "--need",
        default="cpu",
        metavar="LIST",
        help=f"What a script needs, joined by commas: {', '.join(NEEDS)}. Default: cpu, what a run "
        "with --device cpu needs.",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    parser.add_argument(
        "--quiet", action="store_true", help="Print only what is missing of --need."
    )
    parser.add_argument(
        "--save",
        type=Path,
        default=Path(),
        metavar="DIRECTORY",
        help="Where checkpoints are to go; default: the current directory.",
    )
    return parser


def _needs(text: str) -> list[str]:
    needs = [each.strip() for each in text.split(",") if each.strip()]
    for need in needs:
        if need not in NEEDS:
            raise UserError(f"--need {need}: unknown; known are {', '.join(NEEDS)}")
    if not needs:
        raise UserError(f"--need is empty: give some of {', '.join(NEEDS)}")
    return needs


Report = dict[str, dict[str, Finding]]
"""The findings by section and name."""


def diagnose(where: Where) -> Report:
    """Run all checks."""
    for package in packages.IMPORTED:
        package.probe()  # in the background, while torch is imported here
    return {
        section: {name: examine(check, where) for name, check in checks.items()}
        for section, checks in SECTIONS.items()
    }


def lacking(report: Report, needs: Sequence[str]) -> list[str]:
    """Say, a line each, what is missing of what is needed."""
    findings = {name: each for section in report.values() for name, each in section.items()}
    wanted = {name: need for need in needs for name in NEEDS[need]}
    return [
        f"{need}: {name}: {findings[name].value}"
        + (f" ({findings[name].cost})" if findings[name].cost else "")
        for name, need in wanted.items()
        if findings[name].status == MISSING
    ]


def _as_text(report: Report) -> str:
    width = max(len(name) for section in report.values() for name in section)
    lines = [time.strftime(f"{socket.gethostname()}, %Y-%m-%d %H:%M:%S UTC", time.gmtime())]
    for section, findings in report.items():
        lines.append(f"\n{section}")
        for name, each in findings.items():
            lines.append(f"  {each.status:<8} {name:<{width}}  {each.value}")
            if each.cost:
                lines.append(f"{'':<{width + 13}}-> {each.cost}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the program; gives its exit code.

    Raises:
        UserError: A flag is wrong.
    """
    args = _parser().parse_args(argv)
    needs = _needs(args.need)
    if args.save.exists() and not args.save.is_dir():
        raise UserError(f"--save {args.save}: is a file, and must be a directory")
    report = diagnose(Where(save=args.save))
    missing = lacking(report, needs)
    if args.json:
        findings = {
            section: {name: asdict(each) for name, each in checks.items()}
            for section, checks in report.items()
        }
        content = {"needs": needs, "ready": not missing, "lacking": missing, "findings": findings}
        print(json.dumps(content, indent=2))
        return 1 if missing else 0
    if not args.quiet:
        print(_as_text(report) + "\n")
    for line in missing:
        print(f"MISSING for {line}")
    if not missing and not args.quiet:
        print(f"Ready for {', '.join(needs)}.")
    return 1 if missing else 0
