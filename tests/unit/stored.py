"""Small checkpoints like Megatron's, made without it, and what can happen to them."""

from __future__ import annotations

import io
import json
import os
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata

from megatron_prores.checkpoint import manifest
from megatron_prores.config.prores_config import ProResConfig

COMMON = "common_state/shard_0_1"


def unguard_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes back, after a test, what makes loading safe, which other tests do without."""
    monkeypatch.setattr(filesystem, "pickle", pickle)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")


def make_two(root: Path) -> Path:
    """Makes two checkpoints, of iterations 2 and 4."""
    for iteration in (2, 4):
        make(root, iteration)
    return root


def make(
    root: Path, iteration: int, tensors: dict[str, torch.Tensor] | None = None, **args: Any
) -> Path:
    """Makes a checkpoint of one iteration of a ProRes run with four layers."""
    config = ProResConfig(schedule="linear", warmup_iters=8)
    saved = {
        "num_layers": 4,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "data_parallel_size": 3,
        "world_size": 6,
        "prores_schedule": "linear",
        "prores_warmup_iters": 8,
        "prores_warmup_iters_per_layer": None,
        "prores_warmup_samples": None,
        "norm_placement": "pre",
        "branch_init": "auto",
        "embedding_weight_decay": False,
        "prores_settings": config.settings(4),
    }
    common = {"args": Namespace(**{**saved, **args}), "iteration": iteration}
    directory = root / f"iter_{iteration:07d}"
    weights = {"decoder.weight": torch.arange(6.0).view(2, 3), "step": torch.tensor(iteration)}
    state = {**(weights if tensors is None else tensors), COMMON: [common]}
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(state, checkpoint_id=directory, planner=planner, no_dist=True)
    content = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (directory / "metadata.json").write_text(json.dumps(content))
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    sign(directory)
    return directory


def make_llama(root: Path, **shape: Any) -> Path:
    """Makes a checkpoint of a Llama-like model, whose weights take no memory while it is made.

    Args:
        root: Of the checkpoints.
        **shape: ``num_layers``, ``hidden_size``, ``ffn_hidden_size``, ``vocab_size``, ``dtype``.
    """
    layers, hidden, ffn = shape["num_layers"], shape["hidden_size"], shape["ffn_hidden_size"]
    vocabulary, dtype = shape["vocab_size"], shape["dtype"]
    in_layer = {
        "self_attention.linear_qkv.weight": (3 * hidden, hidden),
        "self_attention.linear_proj.weight": (hidden, hidden),
        "mlp.linear_fc1.weight": (2 * ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
        "input_layernorm.weight": (hidden,),
        "pre_mlp_layernorm.weight": (hidden,),
    }
    sizes = {
        "embedding.word_embeddings.weight": (vocabulary, hidden),
        "output_layer.weight": (vocabulary, hidden),
        "decoder.final_layernorm.weight": (hidden,),
        **{f"decoder.layers.{n}.{k}": size for n in range(layers) for k, size in in_layer.items()},
    }
    tensors = {name: torch.ones((), dtype=dtype).expand(size) for name, size in sizes.items()}
    return make(
        root,
        8,
        tensors,
        num_layers=layers,
        prores_settings=ProResConfig(schedule="linear", warmup_iters=8).settings(layers),
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=hidden // 128,
        kv_channels=128,
        group_query_attention=False,
        seq_length=1024,
        max_position_embeddings=1024,
        init_method_std=0.02,
        layernorm_epsilon=1e-5,
        normalization="RMSNorm",
        untie_embeddings_and_output_weights=True,
        add_bias_linear=False,
        swiglu=True,
        position_embedding_type="rope",
        rotary_base=10000,
        tokenizer_type="NullTokenizer",
        vocab_size=vocabulary - 1,
        consumed_train_samples=8,
    )


def sign(directory: Path) -> None:
    """Writes the manifest of the files as they are."""
    names = manifest.file_names(directory)
    manifest.write(directory, {name: manifest.digest(directory / name) for name in names})


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_weight(path: Path) -> None:
    """Flips a bit where only a checksum can tell: within the values of a tensor of ``make``."""
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(6.0).numpy().tobytes()) + 8] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def snapshot(root: Path) -> dict[str, bytes]:
    """All that is in a directory, to see that nothing was changed."""
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


class Payload:
    """An object whose unpickling makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # Not of a module that torch refuses in any case.
        return open, (str(self.marker), "w")


def payload(marker: Path, as_torch: bool = False) -> bytes:
    """A malicious pickle, or one within the file format of ``torch.save``; proven to be live."""
    data = io.BytesIO()
    if as_torch:
        torch.save([Payload(marker)], data)
    else:
        pickle.dump(Payload(marker), data)
    data.seek(0)
    os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
    _ = torch.load(data, weights_only=False) if as_torch else pickle.load(data)
    marker.unlink()
    return data.getvalue()


def _plant_item(directory: Path, is_target: Callable[[str], bool], data: bytes) -> None:
    """Puts other bytes in the place of one tensor or object, and corrects the index."""
    index: Metadata = pickle.loads((directory / ".metadata").read_bytes())
    info = next(info for key, info in index.storage_data.items() if is_target(key.fqn))
    path = directory / info.relative_path
    info.offset, info.length = path.stat().st_size, len(data)
    path.write_bytes(path.read_bytes() + data)
    (directory / ".metadata").write_bytes(pickle.dumps(index))


def _plant_index(directory: Path, marker: Path) -> None:
    (directory / ".metadata").write_bytes(payload(marker))


def _plant_common(directory: Path, marker: Path) -> None:
    _plant_item(directory, lambda name: name == COMMON, payload(marker, as_torch=True))


def _plant_tensor(directory: Path, marker: Path) -> None:
    data = payload(marker, as_torch=True)
    _plant_item(directory, lambda name: name.endswith("weight"), data)


def _plant_old_common(directory: Path, marker: Path) -> None:
    (directory / "common.pt").write_bytes(payload(marker, as_torch=True))


def _plant_format(directory: Path, marker: Path) -> None:
    (directory / "metadata.json").write_bytes(payload(marker))


def _plant_manifest(directory: Path, marker: Path) -> None:
    (directory / "integrity.json").write_bytes(payload(marker))


def _plant_tracker(directory: Path, marker: Path) -> None:
    (directory.parent / "latest_checkpointed_iteration.txt").write_bytes(payload(marker))


PLANTS = {
    ".metadata": _plant_index,
    "arguments in a shard": _plant_common,
    "tensor in a shard": _plant_tensor,
    "common.pt": _plant_old_common,
    "metadata.json": _plant_format,
    "integrity.json": _plant_manifest,
    "tracker": _plant_tracker,
}
"""Where a malicious pickle can be put: name -> function of the checkpoint and the marker file."""


def plant(directory: Path, where: str, marker: Path) -> None:
    """Puts a malicious pickle in the place of a file, with a manifest that agrees with it."""
    PLANTS[where](directory, marker)
    if where != "integrity.json":
        sign(directory)
