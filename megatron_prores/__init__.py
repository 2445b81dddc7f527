"""Progressive Residual Warmup (ProRes, arXiv 2603.05369) for Megatron Core.

The names that a Megatron program of one's own needs; README.md shows them at work. Each is imported
when it is first asked for: the schedules need neither torch nor Megatron.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_prores.checkpoint.settings import check_settings
    from megatron_prores.config.placement import PLACEMENTS
    from megatron_prores.config.prores_config import ProResConfig
    from megatron_prores.convert.llama import fold_alphas
    from megatron_prores.model.initial_weights import finish as initialize_weights
    from megatron_prores.model.with_prores import with_prores
    from megatron_prores.schedule.formulas import SCHEDULES, alphas
    from megatron_prores.warmup.audit import AuditError, audit
    from megatron_prores.warmup.residual_warmup import ResidualWarmup

__version__ = "0.1.0"

__all__ = [
    "PLACEMENTS",
    "SCHEDULES",
    "AuditError",
    "ProResConfig",
    "ResidualWarmup",
    "alphas",
    "audit",
    "check_settings",
    "fold_alphas",
    "initialize_weights",
    "with_prores",
]

_PLACES = {
    "PLACEMENTS": "config.placement.PLACEMENTS",
    "SCHEDULES": "schedule.formulas.SCHEDULES",
    "AuditError": "warmup.audit.AuditError",
    "ProResConfig": "config.prores_config.ProResConfig",
    "ResidualWarmup": "warmup.residual_warmup.ResidualWarmup",
    "alphas": "schedule.formulas.alphas",
    "audit": "warmup.audit.audit",
    "check_settings": "checkpoint.settings.check_settings",
    "fold_alphas": "convert.llama.fold_alphas",
    "initialize_weights": "model.initial_weights.finish",
    "with_prores": "model.with_prores.with_prores",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].rpartition(".")
    value = getattr(import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
