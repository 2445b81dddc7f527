"""The indices that Megatron keeps beside its datasets: read as plain arrays of numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_prores.errors import UserError
from megatron_prores.upstream.registry import wrap


def install() -> None:
    """Let no pickle into Megatron's reading of its dataset indices, and name a damaged one.

    Upstream reads them with ``allow_pickle=True`` and an unpickler of restricted means. They are
    arrays of numbers: there is nothing to unpickle.

    Raises:
        RuntimeError: The installed Megatron reads them in another way.
    """
    from megatron.core.datasets import blended_dataset, gpt_dataset

    for module in (gpt_dataset, blended_dataset):
        wrap(module, "safe_numpy_load", ("path", "kwargs"), _load)


def _load(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
    try:
        return stock(allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{named['path']} is not the index of a dataset that Megatron keeps there "
            f"({error}): remove it, and it is made anew"
        ) from error
