"""What a run is told about ProRes: one dataclass, checked once, when it is made."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property

from megatron_prores.errors import UserError
from megatron_prores.placement import PLACEMENTS
from megatron_prores.schedule.custom import (
    FILE,
    CustomSchedule,
    FileSchedule,
    is_custom,
    load_schedule,
)
from megatron_prores.schedule.formulas import SCHEDULES, Alphas, alphas, opening_steps

OFF = "none"
"""The schedule that is no schedule: plain Megatron, no class of ours in the model."""

BRANCH_INITS = ("auto", "normal", "scaled", "deepnorm")
"""Names of the initial weights: ``normal`` is the paper's, ``scaled`` Megatron's and GPT-2's,
``deepnorm`` DeepNorm's, ``auto`` deepnorm for that placement and else normal."""

DEFAULT_WARMUP_ITERS_PER_LAYER = 1000
"""T of the paper's main runs (section 4.1), in iterations."""


@dataclass(frozen=True, kw_only=True)
class ProResConfig:
    """The ProRes part of a run's configuration.

    Raises:
        UserError: The schedule is unknown or cannot be read, or a warmup length is out of range.
    """

    schedule: str = "linear"
    """Name of the schedule, one of ``schedule.SCHEDULES``, or ``none`` for plain Megatron; or the
    user's own, ``file:PATH`` or ``module:function`` (see custom_schedule.py)."""

    warmup_iters: int | None = None
    """W, the length of the whole warmup in iterations. None: T times the number of layers."""

    warmup_iters_per_layer: int | None = None
    """T, the part of one layer in iterations. None: 1000, where W is not given either."""

    warmup_samples: int | None = None
    """W in samples (sequences) instead of iterations: alpha then follows the consumed samples, as
    Megatron's learning rate does in sample-based training, also while the batch size ramps up."""

    norm_placement: str = "pre"
    """Where the norms of a layer sit, one of ``placement.PLACEMENTS``."""

    branch_init: str = "auto"
    """Initial weights of the branches, one of ``BRANCH_INITS``."""

    embedding_weight_decay: bool = False
    """Whether the embedding decays like other weights. The paper's runs decay no embedding."""

    def __post_init__(self) -> None:
        if self.norm_placement not in PLACEMENTS:
            raise UserError(
                f"--norm-placement {self.norm_placement}: no such placement; choose one of "
                f"{', '.join(PLACEMENTS)}"
            )
        if self.branch_init not in BRANCH_INITS:
            raise UserError(
                f"--branch-init {self.branch_init}: no such initialisation; choose one of "
                f"{', '.join(BRANCH_INITS)}"
            )
        if self.schedule not in (OFF, *SCHEDULES) and not is_custom(self.schedule):
            raise UserError(
                f"--prores-schedule {self.schedule}: no such schedule; choose one of "
                f"{', '.join((OFF, *SCHEDULES))}, or give file:PATH or module:function"
            )
        lengths = {
            "--prores-warmup-iters": self.warmup_iters,
            "--prores-warmup-iters-per-layer": self.warmup_iters_per_layer,
            "--prores-warmup-samples": self.warmup_samples,
        }
        given = {flag: value for flag, value in lengths.items() if value is not None}
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} each say how long the warmup is: give one")
        for flag, value in given.items():
            if value < 1:
                raise UserError(
                    f"{flag} {value}: must be at least 1; for a model without warmup use "
                    f"--prores-schedule {OFF}"
                )
            if self.schedule.startswith(FILE):
                raise UserError(
                    f"{flag} {value} cannot be used with --prores-schedule {self.schedule}: its "
                    "steps are those of the file"
                )
        _ = self.custom  # read now, so that what is wrong with it is said now

    @cached_property
    def custom(self) -> CustomSchedule | None:
        """The user's own schedule, read once, when the configuration is made; else None."""
        return load_schedule(self.schedule) if is_custom(self.schedule) else None

    @property
    def schedule_digest(self) -> str | None:
        """The sha256 of the file that the user's own schedule is in; None for a built-in one."""
        return None if self.custom is None else self.custom.digest

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ProResConfig:
        """Build the configuration from parsed flags, or from those that a checkpoint remembers.

        Args:
            args: Has the destinations of the flags of the group "ProRes".

        Raises:
            UserError: A value is wrong.
        """
        return cls(
            schedule=args.prores_schedule,
            warmup_iters=args.prores_warmup_iters,
            warmup_iters_per_layer=args.prores_warmup_iters_per_layer,
            warmup_samples=args.prores_warmup_samples,
            norm_placement=args.norm_placement,
            branch_init=args.branch_init,
            embedding_weight_decay=args.embedding_weight_decay,
        )

    def check_layers(self, num_layers: int) -> None:
        """Refuse a schedule of the user's own that is wrong for a model of ``num_layers``.

        Raises:
            UserError: The schedule is for another number of layers, or not within [0, 1].
        """
        if self.custom is not None:
            self.custom.check(num_layers, self.total_warmup(num_layers))

    @property
    def initialization(self) -> str:
        """The initial weights of the branches, with ``auto`` resolved: normal, scaled, deepnorm."""
        if self.branch_init != "auto":
            return self.branch_init
        return "deepnorm" if PLACEMENTS[self.norm_placement].deepnorm else "normal"

    @property
    def needs_own_layer(self) -> bool:
        """Whether Megatron's stock layer cannot be this model's."""
        return self.enabled or not PLACEMENTS[self.norm_placement].is_stock

    @property
    def enabled(self) -> bool:
        """Whether the run scales its residual branches at all."""
        return self.schedule != OFF

    @property
    def unit(self) -> str:
        """What the steps of the schedule count: "iterations" or "samples"."""
        return "iterations" if self.warmup_samples is None else "samples"

    def total_warmup(self, num_layers: int) -> int:
        """Return W, the length of the whole warmup for a model of ``num_layers``, in ``unit``.

        Of a table in a file that is the step of its last row.
        """
        if isinstance(self.custom, FileSchedule):
            return self.custom.last_step
        if self.warmup_samples is not None:
            return self.warmup_samples
        if self.warmup_iters is not None:
            return self.warmup_iters
        per_layer = self.warmup_iters_per_layer or DEFAULT_WARMUP_ITERS_PER_LAYER
        return per_layer * num_layers

    def settings(self, num_layers: int) -> dict[str, str | int]:
        """List what a checkpoint remembers, by the flag that sets it.

        Two runs with the same settings give every layer the same alpha at every step. Where a value
        follows from another (the warmup from its length per layer), it is the value that counts.
        """
        settings: dict[str, str | int] = {
            # A file is what is in it, wherever it lies.
            "--prores-schedule": FILE if self.schedule.startswith(FILE) else self.schedule,
            "--norm-placement": self.norm_placement,
            "--branch-init": self.initialization,
            "--num-layers": num_layers,
        }
        if self.schedule_digest is not None:
            settings["the sha256 of the schedule's file"] = self.schedule_digest
        has_length = not self.schedule.startswith((FILE, "fix_"))
        if self.enabled and has_length:
            flag = "--prores-warmup-" + ("iters" if self.unit == "iterations" else "samples")
            settings[flag] = self.total_warmup(num_layers)
        return settings

    def alphas(self, step: int, num_layers: int) -> Alphas:
        """Evaluate the schedule: alpha of layer 1..L at ``step``, in ``unit``; float64 [L]."""
        warmup = self.total_warmup(num_layers)
        if self.custom is not None:
            return self.custom.alphas(step, num_layers, warmup)
        return alphas(self.schedule, step, num_layers, warmup)

    def opening_steps(self, num_layers: int) -> list[int | None]:
        """Return for layer 1..L the step from which alpha is 1, in ``unit``; None for never."""
        warmup = self.total_warmup(num_layers)
        if self.custom is not None:
            return self.custom.opening_steps(num_layers, warmup)
        return opening_steps(self.schedule, num_layers, warmup)
