"""Turn a hybrid model's checkpoint into one that a GPT model goes on from.

Megatron translates the other way alone, while it loads. The tensors of both are the same, and only
their names differ: layers 0 and 1 of the hybrid model are the attention and the MLP of the GPT
model's layer 0. So nothing but the index and the arguments is written anew; the files of tensors
get a second name where the file system can (a hard link), and are copied where it cannot.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_prores.checkpoint import manifest, safe_load
from megatron_prores.checkpoint.manifest import Manifest
from megatron_prores.checkpoint.reader import COMMON, INDEX, OLD_COMMON, TRACKER, StoredCheckpoint
from megatron_prores.convert.export import find_checkpoint
from megatron_prores.data.staging import staging_directory
from megatron_prores.errors import Parser, UserError
from megatron_prores.schedule.depth import is_gpt_pattern, total_depth

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+(?=\.)")

# A GPT model has no state here, and its checkpoint no such entry.
_HYBRID_ONLY = "output_layer._extra_state"

_COMMON_FILE = "common.distcp"


def convert(stored: StoredCheckpoint, output: Path) -> None:
    """Write the checkpoint of the GPT model, and a tracker file that names it: all or nothing.

    Args:
        stored: The hybrid model's checkpoint.
        output: What ``--load`` of the GPT run names; made.

    Raises:
        UserError: The checkpoint is no GPT model's, or the output exists or cannot be written.
    """
    args, source = stored.args, stored.directory
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if pattern is None:
        raise UserError(f"--load {source}: holds a GPT model already")
    if not is_gpt_pattern(pattern) or "/" in pattern:
        raise UserError(
            f"--load {source}: --hybrid-layer-pattern {pattern} is no GPT model: only *- or *E, "
            "over and over, is one"
        )
    if any(name.startswith("optimizer.distributed.") for name in stored.tensors):
        raise UserError(
            f"--load {source}: holds the optimizer in the order of a hybrid model's parameters: go "
            "on as that model, and save with --dist-ckpt-optim-fully-reshardable"
        )
    if output.exists():
        raise UserError(f"--output {output}: exists; give another one")
    try:
        with staging_directory(output.absolute()) as staging:
            made = staging / "saved"
            directory = made / source.name
            directory.mkdir(parents=True)
            for name in manifest.file_names(source):
                if name not in (INDEX, OLD_COMMON):
                    _link(source / name, directory / name)
            index = _renamed(stored.index)
            _add_common(index, source, directory)
            (directory / INDEX).write_bytes(pickle.dumps(index))
            manifest.write(directory, _manifest(source, directory), order=1)
            iteration = source.name.removeprefix("iter_")
            (made / TRACKER).write_text(str(int(iteration)) if iteration.isdigit() else iteration)
            os.replace(made, output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot write: {error.strerror or error}") from error


def gpt_name(name: str) -> str:
    """Return the name in a GPT model's checkpoint of unlike layers, which has each layer apart."""
    name = _LAYER.sub(lambda layer: str(int(layer[0]) // 2), name)
    return name.replace("decoder.final_norm.", "decoder.final_layernorm.")


def _renamed(index: Metadata) -> Metadata:
    """Return the index under a GPT model's names, without what no GPT model has."""
    return replace(
        index,
        state_dict_metadata={
            gpt_name(name): kind
            for name, kind in index.state_dict_metadata.items()
            if not name.startswith(_HYBRID_ONLY)
        },
        storage_data={
            replace(key, fqn=gpt_name(key.fqn)): place
            for key, place in index.storage_data.items()
            if not key.fqn.startswith(_HYBRID_ONLY)
        },
    )


def _add_common(index: Metadata, source: Path, directory: Path) -> None:
    """Write the state common to all ranks as a GPT run has it, and where it is into the index."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages and process groups that this does not need
        from megatron.core.dist_checkpointing import load_common_state_dict

        # By Megatron itself, because objects of its classes are written again.
        common = load_common_state_dict(str(source))
    args = common["args"]
    args.num_layers = args.encoder_num_layers = total_depth(args)
    args.hybrid_layer_pattern = None
    # Megatron asks a GPT model for its tensors by this: each layer's under a name of its own.
    common["content_metadata"] = {
        **common.get("content_metadata", {}),
        "non_homogeneous_layers": True,
    }
    file = directory / _COMMON_FILE
    torch.save([common], file)
    index.state_dict_metadata[COMMON] = BytesStorageMetadata()
    index.storage_data[MetadataIndex(COMMON)] = _StorageInfo(file.name, 0, file.stat().st_size)


def _manifest(source: Path, directory: Path) -> Manifest:
    """Return the manifest, in which the linked files are what they are in the source's."""
    new = (INDEX, _COMMON_FILE)
    names = manifest.file_names(directory)
    known = manifest.read(source) or {}
    entries = {name: known[name] for name in names if name in known and name not in new}
    rest = [name for name in names if name not in entries]
    return entries | manifest.digests(directory, rest)


def _link(source: Path, name: Path) -> None:
    """Give a file a second name, or copy it where that cannot be."""
    try:
        os.link(source, name)
    except OSError:
        shutil.copy2(source, name)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command ``tools/hybrid_to_gpt.py``.

    Args:
        argv: Arguments; those of the process by default.

    Raises:
        UserError: An argument or the checkpoint is not usable.
    """
    parser = Parser(description="Turn a hybrid model's checkpoint into a GPT model's.")
    parser.add_argument(
        "--load", type=Path, required=True, help="what --save of the run named, or one iteration"
    )
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="by default the newest")
    parser.add_argument(
        "--output", type=Path, required=True, help="what --load of the GPT run names; made"
    )
    args = parser.parse_args(argv)
    safe_load.install()
    stored = find_checkpoint(args.load, args.ckpt_step)
    convert(stored, args.output)
    layers = total_depth(stored.args)
    print(f"{args.output}: {stored.directory.name} as a GPT model of {layers} layers")
