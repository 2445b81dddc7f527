"""The paper's own runs as Slurm job arrays."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_prores.errors import UserError
from megatron_prores.plan.planner import MAIN_PROGRAM, make_plan
from megatron_prores.runs.plot import size_of
from studies.paper import recipes

_REPOSITORY = Path(__file__).parents[2]
_NORMS = ("--log-layer-norms-interval", "1000")

_ARRAYS = {
    "norm_placements.sh": "c4",
    "depth_study.sh": "depth",
    "schedule_ablation.sh": "ablation",
}
"""Script of a study -> its name in recipes.jobs."""

_SCRIPTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "table2": (("norm_placements.sh",),),
    "table6": (("schedule_ablation.sh",),),
    "figure1": (("depth_study.sh",),),
    "figure2": (("depth_study.sh", "--log-spikes"),),
    "figure3": tuple(("pretrain_1b.sh", "pre", arm, *_NORMS) for arm in ("plain", "prores")),
    "figure4": tuple(("pretrain_1b.sh", "pre", arm) for arm in ("plain", "prores")),
    "figure5": tuple(("pretrain_7b.sh", "pre", arm) for arm in ("plain", "prores")),
}
"""Figure or table -> examples, with their words."""


def commands(exhibit: str) -> list[list[str]]:
    """Build the commands of sbatch that train the runs of a figure or table.

    Args:
        exhibit: As "table2"; "main" is that, "all" is everything once.

    Raises:
        UserError: The paper's cluster has no such part.
    """
    if exhibit in ("see", "short"):
        raise UserError(f"{exhibit} --scale cluster: a first look is of --scale minutes or kit")
    if exhibit == "all":
        wanted = [_SCRIPTS[name] for name in ("table2", "table6", "figure2", "figure5")]
        scripts = [script for each in wanted for script in each]
    else:
        scripts = list(_SCRIPTS["table2" if exhibit == "main" else exhibit])
    found = []
    for script, *words in scripts:
        example = f"examples/{script}"
        if script in _ARRAYS:
            last = len(recipes.jobs(_ARRAYS[script])) - 1
            found.append(
                ["sbatch", f"--array=0-{last}", "examples/slurm/sweep.sbatch", example, *words]
            )
        else:
            nodes = recipes.table()["sizes"][script.removeprefix("pretrain_")[:-3]].nodes
            found.append(
                ["sbatch", f"--nodes={nodes}", "examples/slurm/pretrain.sbatch", example, *words]
            )
    return found


def show(exhibit: str) -> Iterator[str]:
    """Write the commands of a figure or table and their runs, the first of each size planned.

    Raises:
        UserError: The main program would refuse a run.
    """
    for command in commands(exhibit):
        yield shlex.join(command)
        _, how, _, script, *words = command
        if not how.startswith("--array"):
            yield _plan(script, words, int(how.removeprefix("--nodes=")))
            continue
        planned = set()
        for number, job in enumerate(recipes.jobs(_ARRAYS[Path(script).name])):
            yield f"  {number:>3}  {job.words}"
            settings = recipes.settings(job.run, job.placement, job.schedule)
            size = settings["LAYERS"], settings["HIDDEN_SIZE"]
            if size not in planned:
                planned.add(size)
                yield _plan(script, [*job.words.split(), *words], nodes=1)


def _plan(script: str, words: Sequence[str], nodes: int) -> str:
    """Plan a run of an example on nodes of 8 GPUs, in one line."""
    job = {"NNODES": str(nodes), "NODE_RANK": "0", "MASTER_ADDR": "node0"}
    shown = subprocess.run(
        ["bash", script, *words, "--dry-run"],
        cwd=_REPOSITORY, env=os.environ | job, capture_output=True, text=True,
    )  # fmt: skip
    if shown.returncode:
        raise UserError(f"{script}: {shown.stderr.strip().removeprefix('error: ')}")
    line = shlex.split(shown.stdout.replace("\\\n", ""))
    program = next(at for at, word in enumerate(line) if Path(word).name == MAIN_PROGRAM)
    plan = make_plan(line[program + 1 :], 8 * nodes)
    figures = [
        f"{plan.parameters['total']:,} parameters",
        f"{plan.world_size} GPUs",
        f"{size_of(plan.training['tokens'])} tokens",
        f"{plan.memory['fullest_total'] / 2**30:.1f} GiB on the fullest GPU",
        *(f"warning: {warning}" for warning in plan.warnings),
    ]
    return f"       planned: {', '.join(figures)}"


def submit(exhibit: str) -> None:
    """Hand the runs of a figure or table to Slurm.

    Raises:
        UserError: This machine has no sbatch, or it refused.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--scale cluster: no sbatch on this machine; --dry-run shows what it gets")
    for command in commands(exhibit):
        code = subprocess.run(command, cwd=_REPOSITORY, env=os.environ).returncode
        if code:
            raise UserError(f"{shlex.join(command)}: ended with code {code}")
