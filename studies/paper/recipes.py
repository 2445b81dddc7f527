"""The settings of the paper's runs, and their published results, from runs.toml beside this file.

    python -m studies.paper.recipes settings RUN PLACEMENT SCHEDULE
    python -m studies.paper.recipes jobs STUDY
    python -m studies.paper.recipes gpu-flags GPUS GPUS_PER_NODE TP PP PRECISION WITHOUT -- FLAGS

``settings`` prints NAME=VALUE lines, which examples/launcher.sh takes for the variables that the
user has not set; ``jobs`` the runs of a study, numbered, in the words of its script; ``gpu-flags``
what makes a run fast on GPUs. Plain Python 3.11, so that a dry run works with nothing installed.
"""

from __future__ import annotations

import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_prores.launch.gpu_flags import Setup, gpu_flags

TABLE = Path(__file__).with_name("runs.toml")

PLACEMENTS = ("pre", "sandwich", "post", "deepnorm", "lns", "scaled", "ds")
"""The launcher's words: norm placements, and two initial weights of pre-norm."""

PLAIN = "none"
"""The schedule of a run without ProRes."""


@dataclass(frozen=True)
class Size:
    """A model of the paper."""

    name: str
    parameters: str
    layers: int
    hidden_size: int
    ffn_hidden_size: int
    heads: int
    learning_rate: dict[str, float]
    """By placement; "default" for those that have none of their own."""
    nodes: int
    """Of 8 GPUs of 80 GB."""
    micro_batch_size: int
    """In sequences."""
    hours: int | None = None
    """The paper's, on one node of 8 x H800."""


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    run: str
    """As :func:`settings` takes it."""
    placement: str
    schedule: str
    words: str
    """What the study's script takes."""
    perplexity: float | str | None = None
    """As published, on C4-en; the word "diverged"; or None where it is only drawn in a figure."""


@cache
def table() -> dict[str, Any]:
    """Read runs.toml.

    Raises:
        ValueError: A size, a rate or a row is not complete, or has a name that nobody reads.
    """
    runs = tomllib.loads(TABLE.read_text())
    try:
        runs["sizes"] = {key: Size(**size) for key, size in runs["sizes"].items()}
    except TypeError as error:
        raise ValueError(f"{TABLE}: sizes: {error}") from error
    rates = {key: size.learning_rate for key, size in runs["sizes"].items()}
    for key, by_placement in {"all": runs["all"]["learning_rate_warmup_percent"], **rates}.items():
        if "default" not in by_placement or set(by_placement) - {"default", *PLACEMENTS}:
            raise ValueError(f"{TABLE}: {key}: {by_placement} is not by placement, with a default")
    for row in runs["ablation"]["rows"]:
        if set(row) - {"schedule", "warmup_iters", *PLACEMENTS}:
            raise ValueError(f"{TABLE}: ablation: {row}: the columns are placements")
    return runs


def jobs(study: str) -> list[Job]:
    """List the runs of a study, in the order of their numbers.

    Args:
        study: "depth" (figures 1 and 2), "ablation" (table 6), or "c4" (table 2).

    Raises:
        ValueError: There is no such study.
    """
    listed = {"depth": _depth_jobs, "ablation": _ablation_jobs, "c4": _c4_jobs}
    if study not in listed:
        raise ValueError(f"{study}: no such study; choose one of {' '.join(listed)}")
    return listed[study]()


def _depth_jobs() -> list[Job]:
    study = table()["depth"]
    methods = [(placement, PLAIN, f"{placement} plain") for placement in study["baselines"]]
    methods += [("pre", schedule, f"pre prores {schedule}") for schedule in study["schedules"]]
    return [
        Job(f"depth_{depth['layers']}", placement, schedule, f"{depth['layers']} {words}")
        for depth in study["depths"]
        for placement, schedule, words in methods
    ]


def _ablation_jobs() -> list[Job]:
    found = []
    for row in table()["ablation"]["rows"]:
        schedule, warmup = row["schedule"], row.get("warmup_iters")
        run = f"ablation_{warmup}" if warmup else "ablation"
        words = "plain" if schedule == PLAIN else f"{schedule} {warmup}" if warmup else schedule
        found += [
            Job(run, placement, schedule, f"{words} {placement}", row[placement])
            for placement in PLACEMENTS
            if placement in row
        ]
    return found


def _c4_jobs() -> list[Job]:
    return [
        Job(size, placement, schedule, f"{size} {placement} {words}", perplexity)
        for placement, by_size in table()["results"]["c4"].items()
        for size, pair in by_size.items()
        for (schedule, words), perplexity in zip(
            ((PLAIN, "plain"), ("linear", "prores linear")), pair, strict=True
        )
    ]


def settings(run: str, placement: str, schedule: str) -> dict[str, str]:
    """Return the settings of a run, as variables of examples/launcher.sh.

    Args:
        run: A size, such as "130m"; "depth_" and a number of layers; "ablation", with T = 1000, or
            "ablation_" and a number of iterations for W.
        placement: One of ``PLACEMENTS``.
        schedule: Of ProRes, or "none".

    Returns:
        Variables in capital letters, and three of the launcher's own: ``lr_warmup_percent`` and
        ``lr_decay_percent`` of the iterations, and ``recipe_flags``.

    Raises:
        ValueError: There is no such run.
    """
    runs = table()
    study, _, number = run.partition("_")
    common, values = runs["all"], {}
    warmup = {"WARMUP_ITERS_PER_LAYER": common["warmup_iters_per_layer"]}
    size = runs["sizes"].get(run)
    if study == "depth":
        depths = {str(depth["layers"]): depth for depth in runs["depth"]["depths"]}
        if number not in depths:
            raise ValueError(
                f"{number}: choose one of {' '.join(depths)} layers, or --job and a number "
                "(--list shows them)"
            )
        size, depth = runs["sizes"][runs["depth"]["size"]], depths[number]
        values = {"LAYERS": depth["layers"], "MICRO_BATCH_SIZE": depth["micro_batch_size"]}
        warmup = {"WARMUP_ITERS_PER_LAYER": depth["warmup_iters_per_layer"]}
        if schedule == "equal":
            warmup = {"WARMUP_ITERS": runs["depth"]["equal_warmup_iters"]}
    elif study == "ablation":
        ablation = runs["ablation"]
        size = runs["sizes"][ablation["size"]]
        values = {
            "TRAIN_ITERS": ablation["train_iters"],
            "GLOBAL_BATCH_SIZE": ablation["global_batch_size"],
            "MICRO_BATCH_SIZE": ablation["micro_batch_size"],
            "TP": ablation["tensor_parallel"],
            "PP": ablation["pipeline_parallel"],
        }
        if number:
            warmup = {"WARMUP_ITERS": number}
    if size is None:
        raise ValueError(f"{run}: no such run; a size is one of {' '.join(runs['sizes'])}")

    percent = common["learning_rate_warmup_percent"]
    values = {
        "LAYERS": size.layers,
        "HIDDEN_SIZE": size.hidden_size,
        "FFN_HIDDEN_SIZE": size.ffn_hidden_size,
        "HEADS": size.heads,
        "LEARNING_RATE": f"{size.learning_rate.get(placement, size.learning_rate['default']):g}",
        "MICRO_BATCH_SIZE": size.micro_batch_size,
        "SEQ_LENGTH": common["sequence_length"],
        "GLOBAL_BATCH_SIZE": common["global_batch_size"],
        "TRAIN_ITERS": common["train_iters"],
        "VOCAB_SIZE": common["vocabulary"],
        "lr_warmup_percent": percent.get(placement, percent["default"]),
        "lr_decay_percent": common["learning_rate_decay_percent"],
        "recipe_flags": " ".join(_flags(common["flags"])),
        **warmup,
        **values,
    }
    return {name: str(value) for name, value in values.items()}


def _flags(flags: dict[str, float | str | bool]) -> list[str]:
    """Write Megatron's flags; a switch that is true has no value."""
    words = []
    for name, value in flags.items():
        words.append(f"--{name}")
        if value is not True:
            words.append(value if isinstance(value, str) else f"{value:g}")
    return words


def _gpu_flags(*words: str, given: list[str]) -> list[str]:
    gpus, per_node, tensor, pipeline = map(int, words[:4])
    setup = Setup(
        tensor=tensor,
        # Where the ranks do not divide, the program says so.
        replicas=gpus // (tensor * pipeline),
        gpus_per_node=per_node,
        bf16=words[4] != "fp32",
        transformer_engine="transformer_engine" not in words[5],
        apex="apex" not in words[5],
    )
    return gpu_flags(setup, given)


def main(argv: list[str]) -> None:
    """Print settings, jobs or flags, as the module says.

    Raises:
        ValueError: There is no such run, or no such study.
    """
    if argv[:1] == ["gpu-flags"]:
        print(" ".join(_gpu_flags(*argv[1:7], given=argv[8:])))
    elif argv[:1] == ["jobs"]:
        for number, job in enumerate(jobs(*argv[1:])):
            print(number, job.words)
    else:
        for name, value in settings(*argv[1:]).items():
            print(f"{name}={value}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
