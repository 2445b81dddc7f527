"""What a checkpoint for any layout costs at each save, beside one for the layout of the run alone.

    python -m studies.save_cost

Trains a model on data-parallel ranks of the CPU device with Megatron's distributed optimizer, which
saves its state as it lies on the ranks, or with ``--dist-ckpt-optim-fully-reshardable`` parameter
by parameter. The sides take turns, round by round.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from megatron_prores.errors import Parser, UserError, run_program
from studies.measured import run_measured

_PROGRAM = Path(__file__).resolve().parents[1] / "pretrain_gpt_prores.py"

_RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"
SIDES = {
    "for this layout": [],
    "for any layout": [_RESHARDABLE],
    "for any layout, by one rank": [
        _RESHARDABLE, "--distrib-optim-fully-reshardable-mem-efficient",
    ],
}  # fmt: skip

_SAVES = 4
"""Of each run; the first plans what follows, and is left out."""
_TIMER = re.compile(r"save-checkpoint \.*: \([\d.]+, ([\d.]+)\)")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison.

    Raises:
        UserError: A side failed.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    memory = dict.fromkeys(SIDES, 0.0)
    for number in range(args.rounds):
        for side, flags in SIDES.items():
            with tempfile.TemporaryDirectory(dir=".") as folder:
                taken, peak = _saves([*_command(args, folder), *flags])
            seconds[side] += taken
            memory[side] = max(memory[side], peak)
            print(f"round {number + 1}: {side}: {median(taken):.2f} s, {peak:.0f} MB", flush=True)
    base = next(iter(SIDES))
    print(f"\n{args.rounds} rounds of {_SAVES - 1} saves, {args.ranks} ranks; medians:")
    for side, taken in seconds.items():
        print(
            f"{side}: {median(taken):.2f} s a save [{min(taken):.2f}, {max(taken):.2f}], "
            f"{median(taken) / median(seconds[base]):.2f} times; {memory[side]:.0f} MB of memory "
            "at most, of all ranks"
        )


def _command(args: argparse.Namespace, folder: str) -> list[str]:
    heads = max(1, args.hidden_size // 64)
    model = f"""--device cpu --num-layers {args.num_layers} --hidden-size {args.hidden_size}
        --num-attention-heads {heads} --normalization RMSNorm --swiglu --disable-bias-linear
        --position-embedding-type rope --untie-embeddings-and-output-weights --seq-length 32
        --max-position-embeddings 32 --micro-batch-size 1 --global-batch-size {args.ranks}
        --lr 1e-4 --lr-decay-style constant --prores-schedule linear --prores-warmup-iters 9
        --mock-data --tokenizer-type NullTokenizer --vocab-size 8000 --num-workers 0
        --eval-iters 0 --eval-interval 1000 --train-iters {_SAVES} --save-interval 1
        --save-retain-interval {_SAVES} --save {folder} --use-distributed-optimizer"""
    launcher = f"-m megatron_prores.launch --standalone --nproc-per-node {args.ranks}"
    return [sys.executable, *launcher.split(), str(_PROGRAM), *model.split()]


def _saves(command: Sequence[str]) -> tuple[list[float], float]:
    """Return the seconds of the slowest rank at each save but the first, and the memory in MB."""
    _, peak, printed = run_measured(command)
    taken = [float(slowest) / 1e3 for slowest in _TIMER.findall(printed)][1:]
    if len(taken) < _SAVES - 1:
        raise UserError(f"not {_SAVES} times of saves in the log: {printed[-2000:]}")
    return taken, peak


if __name__ == "__main__":
    run_program(main)
