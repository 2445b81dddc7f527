"""Computes every golden case on the GPU, in one process: local and Transformer Engine's modules."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from megatron_prores.command_line import device
from megatron_prores.system.environment import is_installed
from tests import golden
from tests.distributed import golden_ranks


def layouts() -> dict[str, dict[str, Any]]:
    """Names the implementations: what differs from the golden tests' model on the CPU."""
    local: dict[str, Any] = {"gradient_accumulation_fusion": False}
    te = {**local, "transformer_impl": "transformer_engine"}
    bf16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    return {"local": local, "te": te, "te_bf16": te | bf16}


def main(directory: Path) -> None:
    """Leaves the results of each case and implementation in a folder of its own."""
    device.prepare("cuda")
    torch.cuda.set_device(0)
    from megatron.core import parallel_state

    for case in golden.load_json("meta.json")["cases"]:
        for name, layout in layouts().items():
            if name != "local" and not is_installed("transformer_engine"):
                continue
            place = directory / f"{case}-{name}"
            place.mkdir()
            golden_ranks.run_forward_case(case, layout, str(place))
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
