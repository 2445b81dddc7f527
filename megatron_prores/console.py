"""The console commands of the installed package (pyproject.toml); a clone has them in tools/."""

from __future__ import annotations

import sys

from megatron_prores.errors import run_program


def checkpoint() -> None:
    """Run ``prores-checkpoint``: list, verify and compare checkpoints."""
    from megatron_prores.checkpoint.tool import main

    run_program(main)


def compare() -> None:
    """Run ``prores-compare``: the numbers and curves of runs beside each other."""
    from megatron_prores.runs.compare import main

    run_program(main)


def dataset() -> None:
    """Run ``prores-dataset``: join, check, count and split datasets."""
    from megatron_prores.data.dataset_tool import main

    run_program(main)


def doctor() -> None:
    """Run ``prores-doctor``: what this machine has, and what is missing."""
    from megatron_prores.doctor.main import main

    run_program(main)


def evaluate() -> None:
    """Run ``prores-evaluate``: score checkpoints with lm-evaluation-harness."""
    from megatron_prores.evaluation.harness import main

    run_program(main)


def export() -> None:
    """Run ``prores-export``: a checkpoint in Hugging Face's format."""
    from megatron_prores.convert.export import main

    run_program(main)


def generate() -> None:
    """Run ``prores-generate``: let a checkpoint go on with a text."""
    from megatron_prores.evaluation.text import main

    run_program(main)


def import_model() -> None:
    """Run ``prores-import``: a model in Hugging Face's format as a checkpoint."""
    from megatron_prores.convert.from_hugging_face import main

    run_program(main)


def launch() -> None:
    """Run ``prores-launch``: torchrun, with the exit code of the run."""
    from megatron_prores.launch.main import main

    run_program(lambda: main(sys.argv[1:]))


def plan() -> None:
    """Run ``prores-plan``: what a training run will do."""
    from megatron_prores.plan.main import main

    run_program(main)


def plot() -> None:
    """Run ``prores-plot``: draw a run's losses and the warmup of its layers."""
    from megatron_prores.runs.plot import main

    run_program(main)


def preprocess() -> None:
    """Run ``prores-preprocess``: text to Megatron's indexed dataset."""
    from megatron_prores.data.preprocess import main

    run_program(main)


def tokenizer() -> None:
    """Run ``prores-tokenizer``: train a SentencePiece tokenizer."""
    from megatron_prores.data.tokenizer import main

    run_program(main)
