"""Score checkpoints with lm-evaluation-harness: ``tools/evaluate.py``."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_prores.checkpoint import manifest
from megatron_prores.checkpoint.reader import iterations
from megatron_prores.convert.export import Source, open_checkpoint
from megatron_prores.errors import Parser, UserError
from megatron_prores.evaluation.exported import (
    add_model_arguments,
    default_device,
    exported,
    load_model,
)
from megatron_prores.runs.plot import save_figure
from megatron_prores.system.files import atomic_write

TASKS = Path(__file__).with_name("tasks")
"""Task files of this project."""

PAPER: dict[str, dict[str, tuple[float, float]]] = tomllib.loads((TASKS / "paper.toml").read_text())
"""Task, or "average" over the ten -> method -> the paper's score without and with ProRes."""

_ACCURACY = ("acc_norm,none", "acc,none")
_PERPLEXITY = ("word_perplexity,none", "perplexity,none")
_POLL_SECONDS = 10.0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Score checkpoints with lm-evaluation-harness, zero-shot by default. They are "
        "exported to Hugging Face's format first, into a cache beside them."
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--tasks",
        required=True,
        help="comma-separated names of the harness's tasks; prores_paper: the paper's",
    )
    parser.add_argument("--include-path", type=Path, help="directory of task files of your own")
    parser.add_argument("--num-fewshot", type=int, default=0, help="default: 0")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N of each task")
    parser.add_argument("--batch-size", type=int, default=8, help="default: 8")
    parser.add_argument(
        "--output",
        type=Path,
        help="of the results; default: evaluation beside the checkpoint",
    )
    parser.add_argument("--wandb-project", help="also send the results to Weights & Biases")
    parser.add_argument("--wandb-exp-name", help="name of the W&B run")
    parser.add_argument(
        "--every",
        type=int,
        metavar="N",
        help="follow a run: score each checkpoint whose iteration N divides, as they come, until "
        "the last iteration of the run, and draw the scores",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command ``tools/evaluate.py``.

    Args:
        argv: Arguments; those of the process by default.

    Raises:
        UserError: An argument, a task or the checkpoint is not usable.
    """
    args = _parser().parse_args(argv)
    for flag, value in (("--every", args.every), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    if args.every is not None and args.ckpt_step is not None:
        raise UserError("--every and --ckpt-step: give one of them")
    if args.wandb_project and not args.wandb_exp_name:
        raise UserError("--wandb-project needs --wandb-exp-name: a name for this run")
    device = default_device(args.device)
    tasks = Tasks(args.tasks, args.include_path)
    output = args.output or args.load / "evaluation"
    results = Results(output / "results.json")
    with _wandb_run(args, output) as run:
        for source in _sources(args):
            scores = results.of(source.iteration)
            left = [name for name in tasks.names if name not in scores]
            if left:
                directory = exported(source, args.dtype, args.tokenizer, args.cache)
                found = evaluate(directory, tasks, left, args, device)
                results.add(source.iteration, found)
                if run is not None:
                    run.log(_scalars(found) | {"iteration": source.iteration})
            print(table(results.of(source.iteration), source), flush=True)
            if args.every is not None:
                draw(results, tasks.names, output / "scores.png")


def _sources(args: argparse.Namespace) -> Iterator[Source]:
    """Yield the checkpoints to score, waiting for those that a run has yet to save."""
    if args.every is None:
        yield open_checkpoint(args.load, args.ckpt_step, args.prores_schedule)
        return
    done: set[int] = set()
    while True:
        there = iterations(args.load) if args.load.is_dir() else {}
        for iteration, directory in there.items():
            # The manifest is the last of a checkpoint that is written.
            ready = (directory / manifest.NAME).is_file()
            if iteration in done or not ready:
                continue
            done.add(iteration)
            source = open_checkpoint(args.load, iteration, args.prores_schedule)
            if iteration % args.every == 0:
                yield source
            if iteration >= int(getattr(source.args, "train_iters", 0) or 0):
                return
        time.sleep(_POLL_SECONDS)


class Tasks:
    """The tasks that were asked for, with their data."""

    def __init__(self, names: str, include_path: Path | None) -> None:
        """Find and load them.

        Raises:
            UserError: There is no such task, or its data is not on this machine.
        """
        if include_path is not None and not include_path.is_dir():
            raise UserError(f"--include-path {include_path}: no such directory")
        from lm_eval.tasks import TaskManager

        paths = [str(path) for path in (TASKS, include_path) if path is not None]
        asked = [name.strip() for name in names.split(",") if name.strip()]
        # To read the harness's 15,000 tasks takes 18 s, which tasks of one's own do not need.
        self.manager = TaskManager(include_path=paths, include_defaults=False)
        if not set(asked) <= set(self.manager.all_subtasks):
            self.manager = TaskManager(include_path=paths)
        known = set(self.manager.all_tasks)
        for name in asked:
            if name not in known:
                raise UserError(f"--tasks {name}: lm-evaluation-harness has no such task")
        self.loaded: dict[str, Any] = {}
        """Name in the results -> the harness's task or group."""
        for name in asked:
            for part in self._parts(name):
                self.loaded |= self._load(part)

    @property
    def names(self) -> list[str]:
        """Return their names, as in the results."""
        return list(self.loaded)

    def _parts(self, name: str) -> list[str]:
        """Return the tasks of our own group, which are scored and reported one by one."""
        if name != "prores_paper":
            return [name]
        import yaml

        group = yaml.safe_load((TASKS / "prores_paper.yaml").read_text())
        return list(group["task"])

    def _load(self, name: str) -> dict[str, Any]:
        """Load a task or a group as one, and what has a tag as several."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found = self.manager.load([name])
        except Exception as error:  # of datasets, of its download, of the task's own code
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--tasks {name}: its data cannot be loaded here ({reason}): where there is a "
                f"network, run the same command once, then copy the directory that HF_HOME names "
                "(~/.cache/huggingface) to this machine; or give task files over local data with "
                "--include-path"
            ) from error
        group = found["groups"].get(name)
        return dict(found["tasks"]) if group is None else {name: group}


def evaluate(
    directory: Path, tasks: Tasks, names: Sequence[str], args: argparse.Namespace, device: str
) -> dict[str, dict[str, float]]:
    """Score an exported model.

    Args:
        directory: Of the export.
        tasks: With their data.
        names: Which of them.
        args: The flags.
        device: "cuda" or "cpu".

    Returns:
        Task -> metric -> value, as lm-evaluation-harness names them.
    """
    from lm_eval import simple_evaluate

    results = simple_evaluate(
        model=harness_model(directory, device, args.batch_size),
        tasks=[tasks.loaded[name] for name in names],
        task_manager=tasks.manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        bootstrap_iters=0,
        log_samples=False,
    )
    assert results is not None, "this process is rank 0"
    return {
        name: {
            metric: float(value)
            for metric, value in figures.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        for name, figures in results["results"].items()
        if name in names
    }


def harness_model(directory: Path, device: str, batch_size: int) -> Any:
    """Build lm-evaluation-harness's model of an export.

    A text is seen as Megatron saw it in training: no token is added, and a document begins behind
    the token that ends one.
    """
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_model(directory, device)
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        add_bos_token=False,
        prefix_token_id=tokenizer.eos_token_id,
        device=device,
    )


class Results:
    """A file of scores: iteration -> task -> metric -> value."""

    def __init__(self, path: Path) -> None:
        """Take up what is there.

        Raises:
            UserError: The file is none of ours.
        """
        self.path = path
        self.scores: dict[str, dict[str, dict[str, float]]] = {}
        if path.exists():
            try:
                self.scores = json.loads(path.read_text())["scores"]
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise UserError(f"--output: {path} cannot be read as results: {error}") from error

    def of(self, iteration: int) -> dict[str, dict[str, float]]:
        """Return the scores of one checkpoint: task -> metric -> value."""
        return self.scores.get(str(iteration), {})

    def add(self, iteration: int, found: dict[str, dict[str, float]]) -> None:
        """Add scores, and write the file."""
        self.scores.setdefault(str(iteration), {}).update(found)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as file:
            file.write(json.dumps({"scores": self.scores}, indent=1) + "\n")


def score_of(figures: dict[str, float]) -> tuple[str, float] | None:
    """Choose the metric that a task is shown by: accuracy, normalized by length where there is one.

    Returns:
        The metric and its value, accuracies in percent; None where there is none.
    """
    for metric in (*_ACCURACY, *_PERPLEXITY):
        if metric in figures:
            factor = 100.0 if metric in _ACCURACY else 1.0
            return metric.split(",")[0], factor * figures[metric]
    return None


def table(scores: dict[str, dict[str, float]], source: Source) -> str:
    """Write the scores of one checkpoint, with the paper's figures beside those that it has."""
    lines = [f"iteration {source.iteration}, {source.tokens} tokens"]
    accuracies = []
    for name, figures in scores.items():
        if (score := score_of(figures)) is None:
            continue
        metric, value = score
        lines.append(f"  {name:<20} {metric:<16} {value:8.2f}")
        if metric.startswith("acc"):
            accuracies.append(value)
        perplexity = next((figures[m] for m in _PERPLEXITY if m in figures), None)
        if perplexity is not None and (beside := _beside(name, source)):
            lines.append(f"  {'':<20} {'perplexity':<16} {perplexity:8.2f}{beside}")
    if len(accuracies) > 1:
        lines.append(f"  {'average':<20} {'accuracy':<16} {sum(accuracies) / len(accuracies):8.2f}")
        if len(accuracies) == 10:
            lines[-1] += _beside("average", source)
    return "\n".join(lines)


def _beside(name: str, source: Source) -> str:
    """Write the paper's score of the same method; nothing where it has none."""
    method = str(getattr(source.args, "branch_init", None))
    if method not in ("scaled", "ds"):  # pre-norm with other initial weights
        method = getattr(source.args, "norm_placement", "pre")
    pair = PAPER.get(name, {}).get(method)
    if pair is None:
        return ""
    return f"   the paper's 1.3B: {pair[0]:.2f} without, {pair[1]:.2f} with ProRes"


def draw(results: Results, names: Sequence[str], path: Path) -> None:
    """Draw the score of each task over the iterations of the run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = sorted(map(int, results.scores))
    for name in names:
        points = [(step, score_of(results.of(step).get(name, {}))) for step in steps]
        drawn = [(step, score[1]) for step, score in points if score is not None]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), marker="o", markersize=4, label=name)
    axes.set_xlabel("iteration")
    axes.set_ylabel("accuracy (%), or perplexity")
    axes.legend(frameon=False)
    save_figure(figure, path)


@contextlib.contextmanager
def _wandb_run(args: argparse.Namespace, output: Path) -> Iterator[Any]:
    """Open the W&B run that all scores go to; None where none is wanted."""
    if not args.wandb_project:
        yield None
        return
    import wandb

    output.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(project=args.wandb_project, name=args.wandb_exp_name, dir=str(output))
    except wandb.Error as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--wandb-project {args.wandb_project}: {reason}; with WANDB_MODE=offline the scores "
            "are kept beside the results, for `wandb sync`"
        ) from error
    with run:
        run.define_metric("evaluation/*", step_metric="iteration")
        yield run


def _scalars(found: dict[str, dict[str, float]]) -> dict[str, float]:
    return {
        f"evaluation/{task}/{metric.split(',')[0]}": value
        for task, figures in found.items()
        for metric, value in figures.items()
    }
