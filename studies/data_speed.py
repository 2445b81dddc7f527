"""Speed and memory of tools/preprocess_data.py beside a plain loop over the tokenizer, and others.

    python -m studies.data_speed --input text.jsonl --tokenizer-model tokenizer.model

The sides take turns, round by round, so that all see the same machine. Each writes the same two
files, which is checked. ``--against FILE`` adds another preprocess_data.py that takes the same
flags, such as Megatron-LM's or an older one of this project.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from megatron_prores.errors import Parser, UserError, run_program
from studies.measured import run_measured

_TOOL = Path(__file__).resolve().parents[1] / "tools" / "preprocess_data.py"


def plain_loop(source: str, model: str, prefix: str) -> None:
    """Tokenize a JSONL file as one writes it down first, with Megatron's writer."""
    import numpy as np
    import sentencepiece
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    pieces = sentencepiece.SentencePieceProcessor(model_file=model)
    path = f"{prefix}_text_document"
    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=np.uint16)
    with open(source) as file:
        for line in file:
            ids = [*pieces.encode(json.loads(line)["text"]), pieces.eos_id()]
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{path}.idx")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison.

    Raises:
        UserError: A side failed, or wrote other bytes than the others.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True)
    parser.add_argument("--tokenizer-model", required=True)
    parser.add_argument("--workers", default="2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", nargs="*", default=[], metavar="FILE")
    parser.add_argument("--no-loop", action="store_true", help="leave out the plain loop")
    parser.add_argument("--plain", metavar="PREFIX", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.plain:
        plain_loop(args.input, args.tokenizer_model, args.plain)
        return
    own = ["--input", args.input, "--tokenizer-model", args.tokenizer_model]
    flags = [*own, "--tokenizer-type", "SentencePieceTokenizer", "--append-eod",
             "--workers", args.workers, "--output-prefix"]  # fmt: skip
    sides = {"this tool": [sys.executable, str(_TOOL), *flags]}
    sides |= {each: [sys.executable, each, *flags] for each in args.against}
    if not args.no_loop:
        module = ["-m", "studies.data_speed"]
        sides["plain loop"] = [sys.executable, *module, *own, "--plain"]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    memory = dict.fromkeys(sides, 0.0)
    written: dict[bytes, str] = {}
    for number in range(args.rounds):
        for side, command in sides.items():
            with tempfile.TemporaryDirectory(dir=".") as folder:
                taken, peak, _ = run_measured([*command, f"{folder}/out"])
                files = (f"{folder}/out_text_document{ending}" for ending in (".bin", ".idx"))
                written[subprocess.check_output(["sha256sum", *files]).replace(
                    folder.encode(), b"")] = side  # fmt: skip
            seconds[side].append(taken)
            memory[side] = max(memory[side], peak)
            print(f"round {number + 1}: {side}: {taken:.1f} s, {peak:.0f} MB", flush=True)
            if len(written) > 1:
                raise UserError(f"these wrote different files: {', '.join(written.values())}")
    size = os.path.getsize(args.input) / 1e6
    best = median(seconds["this tool"])
    print(f"\n{size:.0f} MB, {args.rounds} rounds, the same bytes; medians:")
    for side, taken_by in seconds.items():
        taken = median(taken_by)
        print(
            f"{side}: {taken:.1f} s, {size / taken:.1f} MB/s, {memory[side]:.0f} MB of memory; "
            f"{taken / best:.2f} times the seconds of this tool"
        )


if __name__ == "__main__":
    run_program(main)
