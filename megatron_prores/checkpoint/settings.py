"""The ProRes settings that a checkpoint remembers, and whether a run continues them.

They are ``ProResConfig.settings``. A run that goes on with others would give its layers other
alphas than the ones they were trained with.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_prores.config.flags import FLAGS
from megatron_prores.config.prores_config import OFF

type Settings = Mapping[str, str | int]

PLAIN_MEGATRON: dict[str, str | int] = {"schedule": OFF, "norm_placement": "pre"}
"""The settings of a checkpoint that has none: Megatron's own layer, without warmup."""

# Checkpoints were saved with the flags as names, once.
_NAMES = {flag: name for name, flag in FLAGS.items()}

_LENGTHS = ("warmup_iters", "warmup_samples")


def by_name(settings: Settings | None) -> dict[str, str | int]:
    """Return the settings of a checkpoint, also of one that has none, or names them by flag."""
    saved = PLAIN_MEGATRON if settings is None else settings
    return {_NAMES.get(name, name): value for name, value in saved.items()}


def differences(saved: Settings | None, current: Settings) -> dict[str, tuple[object, object]]:
    """Compare the settings of a checkpoint with those of a run.

    Args:
        saved: As the checkpoint has them; None where it has none, as plain Megatron's.
        current: ``ProResConfig.settings`` of the run.

    Returns:
        Name -> (value in the checkpoint, value of the run) of what is different; None where one of
        the two has no such length. What a checkpoint does not remember is no difference.
    """
    there = by_name(saved)
    found: dict[str, tuple[object, object]] = {
        name: (there[name], value)
        for name, value in current.items()
        if name in there and there[name] != value
    }
    lengths = [name for name in _LENGTHS if name in there or name in current]
    if "schedule" not in found and len(lengths) > 1:
        # One counts iterations, the other one samples.
        found |= {name: (there.get(name), current.get(name)) for name in lengths}
    return found


def check_settings(saved: Settings | None, current: Settings) -> None:
    """Refuse to go on from a checkpoint that was trained with other ProRes settings.

    Args:
        saved: As the checkpoint has them; None where it has none, as plain Megatron's.
        current: ``ProResConfig.settings`` of the run.

    Raises:
        ValueError: Names every setting that differs, with both values.
    """
    if found := differences(saved, current):
        told = "; ".join(
            f"{name} {there!r} there, {here!r} here" for name, (there, here) in found.items()
        )
        raise ValueError(f"the checkpoint was trained with other ProRes settings: {told}")
