"""Transformer Engine's own state in a checkpoint: absent where it was not used, and read safely.

Each of its modules asks a checkpoint for an ``_extra_state``: empty, or, under FP8 with delayed
scaling, a pickle of the scales and of the largest values seen.

- A checkpoint of a model without Transformer Engine (a run on the CPU, the local implementation)
  has none, and Megatron's loading ends at the first that is missing. Here such a module starts as
  it does in a new run; every weight is still required.
- Transformer Engine 2.20 refuses to unpickle the state unless the user allows all of pickle
  (``NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE``), so that a run with delayed scaling could not go on.
  Here Megatron's own restricted unpickler reads it, which knows recipes and tensors and calls
  nothing else; Megatron itself uses it for the experts' modules alone.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_prores.checkpoint import safe_load
from megatron_prores.checkpoint.reader import INDEX
from megatron_prores.checkpoint.saving import REMOTE
from megatron_prores.system.environment import is_installed
from megatron_prores.upstream.registry import replace, wrap

_SUFFIX = "_extra_state"


def load_state(data: bytes) -> Any:
    """Unpickle the FP8 state of a module of Transformer Engine.

    Args:
        data: What the module's ``get_extra_state`` has pickled.

    Raises:
        pickle.UnpicklingError: It asks for anything but recipes and tensors.
    """
    from megatron.core.safe_globals import SafeUnpickler

    return SafeUnpickler(io.BytesIO(data)).load()


def drop_absent_states(requested: Any, saved: Any) -> list[str]:
    """Take out of what is to be loaded the states that the checkpoint does not have.

    Args:
        requested: A sharded state dict, nested dicts and lists, changed in place.
        saved: The keys of the checkpoint's index.

    Returns:
        The names of the modules that start without a state.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    dropped: list[str] = []
    items = list(requested.items()) if isinstance(requested, dict) else list(enumerate(requested))
    for key, value in items:
        if isinstance(value, (dict, list)):
            dropped += drop_absent_states(value, saved)
        elif (
            isinstance(requested, dict)
            and isinstance(value, ShardedObject)
            and value.key.endswith(_SUFFIX)
            and value.unique_key not in saved
        ):
            del requested[key]
            dropped.append(value.key.removesuffix(_SUFFIX).rstrip("."))
    return dropped


def _load(stock: Callable[[], Any], named: dict[str, Any]) -> Any:
    """Load a checkpoint that lacks states of Transformer Engine: its modules start anew."""
    directory = str(named["checkpoint_dir"])
    if directory.startswith(REMOTE):
        return stock()
    index = safe_load.read_index(Path(directory, INDEX))
    dropped = drop_absent_states(named["sharded_state_dict"], index.state_dict_metadata)
    if dropped and torch.distributed.get_rank() == 0:
        print(
            f"> the checkpoint has no Transformer Engine state for {len(dropped)} modules, as it "
            "was trained without: with FP8, their scales start anew"
        )
    return stock()


def install() -> None:
    """Put both into Megatron's loading, in this process.

    Raises:
        RuntimeError: The installed Megatron has other signatures than those relied on.
    """
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    wrap(TorchDistLoadShardedStrategy, "load", ("sharded_state_dict", "checkpoint_dir"), _load)
    if is_installed("transformer_engine"):
        _read_states_safely()


def _read_states_safely() -> None:
    """Let Transformer Engine's modules read their state by Megatron's restricted unpickler."""
    from transformer_engine.pytorch.module import base
    from transformer_engine.pytorch.ops import op

    for module in (base, op):
        replace(module, _read_states_safely, pickle=safe_load.pickle_with(loads=load_state))
    # It asks whether pickle may be used before it calls what is now load_state.
    os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] = "1"
