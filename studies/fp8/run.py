"""One training run of the study: the real main program, with the recipe put into its model."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prores.config import OFF, ProResConfig
from megatron_prores.launch.network import set_single_process_env
from megatron_prores.schedule.custom import is_custom
from studies.fp8.recipes import RECIPES, Recipe

MAIN_PROGRAM = Path(__file__).resolve().parents[2] / "pretrain_gpt_prores.py"


@dataclass(frozen=True)
class Spec:
    """A run: one model, one schedule, one recipe."""

    placement: str
    schedule: str
    """A ProRes schedule, or ``none``."""
    recipe: str
    """One of ``recipes.RECIPES``."""
    seed: int
    device: str
    flags: tuple[str, ...] = field(repr=False)
    """Of the main program: model, data, training."""
    record: tuple[int, ...] = field(repr=False)
    """Steps whose gradients are kept."""
    warmup_iters_per_layer: int = 1000

    def argv(self, tensorboard_dir: Path) -> list[str]:
        """Return the command line of the main program."""
        argv = [
            *("--device", self.device, "--bf16", *self.flags, "--seed", str(self.seed)),
            *("--norm-placement", self.placement, "--prores-schedule", self.schedule),
            *("--tensorboard-dir", str(tensorboard_dir), "--log-interval", "1"),
        ]
        if self.schedule != OFF and not is_custom(self.schedule):
            argv += ["--prores-warmup-iters-per-layer", str(self.warmup_iters_per_layer)]
        recipe = RECIPES[self.recipe]
        if self.device == "cuda" and recipe is not None:
            argv += recipe.flags()
        return argv


def train(spec: Spec, directory: Path) -> dict[str, Any]:
    """Train in this process, which must not have trained before.

    Args:
        spec: The run.
        directory: For its TensorBoard files.

    Returns:
        What it was, its losses and gradient norms by step, and the rows of its gradients.
    """
    from megatron_prores.command_line import device

    device.prepare(spec.device)
    from megatron_prores.plot import TRAIN_TAG, read_scalars
    from megatron_prores.training import prores_run as training
    from megatron_prores.upstream.training_loop import call_around_steps
    from studies.fp8.record import COLUMNS, Recorder

    recorder = Recorder(spec.record)
    put_in: Callable[[list[Any], Recipe | None, Recorder], None]
    if spec.device == "cuda":
        from studies.fp8.transformer_engine import watch as put_in
    else:
        from studies.fp8.linear import emulate as put_in
    stock = training.model_config

    def model_config(args: Any, prores: ProResConfig) -> Any:
        config = stock(args, prores)

        def attach(model_chunks: list[Any]) -> list[Any]:
            put_in(model_chunks, RECIPES[spec.recipe], recorder)
            return model_chunks

        config.post_wrap_hooks = [*config.post_wrap_hooks, attach]
        call_around_steps(recorder.begin, lambda iteration: None)
        return config

    training.model_config = model_config
    set_single_process_env()
    tensorboard = directory / "tensorboard"
    sys.argv = [str(MAIN_PROGRAM), *spec.argv(tensorboard)]
    try:
        runpy.run_path(str(MAIN_PROGRAM), run_name="__main__")
    except SystemExit as end:
        if end.code not in (0, None):
            raise
    scalars = read_scalars(tensorboard)
    return {
        "placement": spec.placement,
        "schedule": spec.schedule,
        "recipe": spec.recipe,
        "seed": spec.seed,
        "loss": [round(float(value), 4) for value in scalars[TRAIN_TAG].values],
        "gradient_norm": [float(f"{value:.3g}") for value in scalars["grad-norm"].values],
        "columns": list(COLUMNS),
        "gradients": recorder.rows(),
    }
