"""What a run is told about ProRes: one dataclass, validated when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

import numpy as np

from megatron_prores.config.placement import PLACEMENTS, placement_of
from megatron_prores.errors import Argument, ArgumentError
from megatron_prores.schedule.custom import (
    FILE,
    CustomSchedule,
    FileSchedule,
    check_name,
    is_custom,
    load_schedule,
)
from megatron_prores.schedule.formulas import SCHEDULES, Alphas, alphas, opening_steps

OFF = "none"
"""The schedule that is no schedule: plain Megatron, no class of ours in the model."""

BRANCH_INITS = ("auto", "normal", "scaled", "ds", "deepnorm")
"""Names of the initial weights: ``normal`` is the paper's, ``scaled`` Megatron's and GPT-2's,
``ds`` DS-Init as in open_lm, ``deepnorm`` DeepNorm's, ``auto`` deepnorm for that placement and else
normal."""

DEFAULT_WARMUP_ITERS_PER_LAYER = 1000
"""T of the paper's main runs (section 4.1), in iterations."""


@dataclass(frozen=True, kw_only=True)
class ProResConfig:
    """The ProRes part of a run's configuration.

    A schedule of the user's own is read when it is first asked for, or by :meth:`load`.

    Raises:
        ArgumentError: A name is unknown, or a warmup length is out of range.
    """

    schedule: str = "linear"
    """Name of the schedule, one of ``schedule.SCHEDULES``, or ``none`` for plain Megatron; or the
    user's own, ``file:PATH`` or ``module:function`` (see schedule/custom.py)."""

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

    truncated_init: bool = False
    """Whether weights are drawn from a normal distribution cut off at three standard deviations, as
    the paper's text has it. Its authors' code draws them from a plain one, and so does False."""

    embedding_weight_decay: bool = False
    """Whether the embedding decays like other weights. The paper's runs decay no embedding."""

    def __post_init__(self) -> None:
        placement_of(self.norm_placement)
        if self.branch_init not in BRANCH_INITS:
            raise ArgumentError(
                Argument("branch_init", self.branch_init),
                f": no such initialisation; choose one of {', '.join(BRANCH_INITS)}",
            )
        schedule = Argument("schedule", self.schedule)
        if is_custom(self.schedule):
            check_name(self.schedule)
        elif self.schedule not in (OFF, *SCHEDULES):
            raise ArgumentError(
                schedule,
                f": no such schedule; choose one of {', '.join((OFF, *SCHEDULES))}, or give "
                "file:PATH or module:function",
            )
        names = ("warmup_iters", "warmup_iters_per_layer", "warmup_samples")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            first, *others = map(Argument, given)
            named = [part for other in others for part in (" and ", other)]
            raise ArgumentError(first, *named, " each say how long the warmup is: give one")
        for name in given:
            length = Argument(name, getattr(self, name))
            if not isinstance(length.value, Integral):
                raise ArgumentError(length, ": must be a whole number")
            if int(length.value) < 1:
                without = Argument("schedule", OFF)
                raise ArgumentError(
                    length, ": must be at least 1; for a model without warmup use ", without
                )
            if self.schedule.startswith(FILE):
                raise ArgumentError(
                    length, " cannot be used with ", schedule, ": its steps are those of the file"
                )

    def load(self) -> None:
        """Read the user's own schedule now, where the configuration names one.

        Raises:
            ArgumentError: Its file cannot be read, or its module cannot be imported.
        """
        _ = self.custom

    @cached_property
    def custom(self) -> CustomSchedule | None:
        """The user's own schedule, read once; None for a built-in one."""
        return load_schedule(self.schedule) if is_custom(self.schedule) else None

    @property
    def schedule_digest(self) -> str | None:
        """The sha256 of the file that the user's own schedule is in; None for a built-in one."""
        return None if self.custom is None else self.custom.digest

    def check_layers(self, num_layers: int) -> None:
        """Refuse a number of layers that there cannot be, or that the schedule is not for.

        Raises:
            ArgumentError: ``num_layers`` is less than 1; or a schedule of the user's own is for
                another number of layers, or not within [0, 1].
        """
        if num_layers < 1:
            raise ArgumentError(Argument("num_layers", num_layers), ": must be at least 1")
        if self.custom is not None:
            self.custom.check(num_layers, self.total_warmup(num_layers))

    @property
    def initialization(self) -> str:
        """The initial weights of the branches, with ``auto`` resolved."""
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
        """Return what a checkpoint should remember, by name: plain data, to be saved with it.

        A run that goes on compares it with its own (:func:`check_settings`): two runs with the same
        settings give every layer the same alpha at every step. Where a value follows from another
        (the warmup from its length per layer), it is the value that counts.

        Args:
            num_layers: L, the layers of the whole model.
        """
        settings: dict[str, str | int] = {
            # A file is what is in it, wherever it lies.
            "schedule": FILE if self.schedule.startswith(FILE) else self.schedule,
            "norm_placement": self.norm_placement,
            "branch_init": self.initialization,
            "num_layers": num_layers,
        }
        if self.schedule_digest is not None:
            settings["schedule_sha256"] = self.schedule_digest
        has_length = not self.schedule.startswith((FILE, "fix_"))
        if self.enabled and has_length:
            name = "warmup_iters" if self.unit == "iterations" else "warmup_samples"
            settings[name] = self.total_warmup(num_layers)
        return settings

    def alphas(self, step: int, num_layers: int) -> Alphas:
        """Evaluate the schedule: alpha of layer 1..L at ``step``, in ``unit``; float64 [L]."""
        if not self.enabled:
            return np.ones(num_layers)
        warmup = self.total_warmup(num_layers)
        if self.custom is not None:
            return self.custom.alphas(step, num_layers, warmup)
        return alphas(self.schedule, step, num_layers, warmup)

    def opening_steps(self, num_layers: int) -> list[int | None]:
        """Return for layer 1..L the step from which alpha is 1, in ``unit``; None for never."""
        if not self.enabled:
            return [0] * num_layers
        warmup = self.total_warmup(num_layers)
        if self.custom is not None:
            return self.custom.opening_steps(num_layers, warmup)
        return opening_steps(self.schedule, num_layers, warmup)
