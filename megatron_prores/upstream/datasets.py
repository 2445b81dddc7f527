"""Megatron's datasets and the processes that load them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from megatron_prores.errors import UserError
from megatron_prores.upstream.registry import wrap


def use_prebuilt_dataset_helpers() -> None:
    """Keep Megatron from compiling its dataset helper where the wheel has brought it compiled.

    The wheel has the compiled module but no Makefile, so that the compilation at start-up fails
    although nothing needs compiling.
    """
    from megatron.core.datasets import utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return

    def compile_nothing(stock: Callable[[], Any], named: dict[str, Any]) -> None:
        pass

    wrap(utils, "compile_helpers", (), compile_nothing, purpose=use_prebuilt_dataset_helpers)


def read_indices_as_numbers() -> None:
    """Let no pickle into Megatron's reading of its dataset indices, and name a damaged one.

    Megatron reads them with ``allow_pickle=True`` and a restricted unpickler. They are arrays of
    numbers: there is nothing to unpickle.

    Raises:
        RuntimeError: The installed Megatron reads them in another way.
    """
    from megatron.core.datasets import blended_dataset, gpt_dataset

    def load(stock: Callable[..., Any], named: dict[str, Any]) -> Any:
        try:
            return stock(allow_pickle=False)
        except OSError:
            raise
        except Exception as error:  # damaged bytes fail in any way
            raise UserError(
                f"{named['path']} is not the index of a dataset that Megatron keeps there "
                f"({error}): remove it, and it is made anew"
            ) from error

    for module in (gpt_dataset, blended_dataset):
        wrap(module, "safe_numpy_load", ("path", "kwargs"), load, purpose=read_indices_as_numbers)


def fork_data_workers() -> None:
    """Start processes by fork, as Megatron's data loaders and checkpoint writers take for granted.

    Their functions are local ones that cannot be pickled; Python 3.14 starts processes otherwise.
    """
    multiprocessing.set_start_method("fork", force=True)
