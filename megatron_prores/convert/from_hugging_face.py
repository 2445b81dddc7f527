"""Import a model in Hugging Face's format as a Megatron checkpoint that any layout can load.

The model is built by Megatron on the CPU device, from the flags that its config.json stands for,
and saved by Megatron: what comes out is what a run of one rank would have saved.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prores.convert.stored_weights import GLM4_NORMS
from megatron_prores.convert.tokenizer import NONE
from megatron_prores.errors import Parser, UserError

_CLASSES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Glm4ForCausalLM",
    "ProResForCausalLM",
)


class SafetensorsWeights(Mapping[str, Tensor]):
    """The weights of an exported model by their Llama names, each read when it is asked for."""

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        """Open the files.

        Raises:
            UserError: There are none.
        """
        from safetensors import safe_open

        self.is_glm4 = config["architectures"][0] == "Glm4ForCausalLM"
        self.channels = config.get("head_dim") or (
            config["hidden_size"] // config["num_attention_heads"]
        )
        self.files: dict[str, Any] = {}
        paths = sorted(directory.glob("*.safetensors"))
        if not paths:
            raise UserError(f"--model {directory}: there is no *.safetensors in it")
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except Exception as error:  # safetensors raises a class of its own
                raise UserError(f"--model {directory}: {path.name} is damaged: {error}") from error
            self.files |= dict.fromkeys(file.keys(), file)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        stored, half = self._place(name)
        self.read.add(stored)
        tensor: Tensor = self.files[stored].get_tensor(stored)
        if half is not None:
            return tensor.chunk(2)[half]
        if self.is_glm4 and name.endswith(("q_proj.weight", "k_proj.weight")):
            # Back from neighbours to halves; see stored_weights.interleave_rope.
            heads = tensor.view(-1, self.channels // 2, 2, *tensor.shape[1:])
            return heads.transpose(1, 2).reshape(tensor.shape)
        return tensor

    def _place(self, name: str) -> tuple[str, int | None]:
        """Return the name in the files, and which half of that tensor is meant."""
        if not self.is_glm4:
            return name, None
        for half, part in enumerate(("gate_proj", "up_proj")):
            if part in name:
                return name.replace(part, "gate_up_proj"), half
        parts = name.split(".")
        if parts[-2] in GLM4_NORMS:
            parts[-2] = GLM4_NORMS[parts[-2]]
        return ".".join(parts), None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._place(name)[0] in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def read_config(directory: Path) -> dict[str, Any]:
    """Read a model's config.json.

    Raises:
        UserError: It is not there, or is none of a model that can be imported.
    """
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        name = config["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--model {directory}: its config.json cannot be read: {error}") from error
    if name not in _CLASSES:
        raise UserError(
            f"--model {directory}: {name} cannot be imported; known are {', '.join(_CLASSES)}"
        )
    return config


def megatron_flags(config: dict[str, Any]) -> list[str]:
    """Return Megatron's flags for a model.

    Args:
        config: Of a Llama-like model, as config.json has it.

    Raises:
        UserError: Megatron has no such model.
    """
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    rope = config.get("rope_parameters") or {
        "rope_type": "default",
        **(config.get("rope_scaling") or {}),
        "rope_theta": config.get("rope_theta", 10000.0),
    }
    placement = config.get("norm_placement", "pre")
    if config["architectures"][0] == "Glm4ForCausalLM":
        placement = "sandwich"
    # A Llama that was exported from lns computes as pre does: its run's name is kept.
    exported = config.get("prores", {}).get("settings", {}).get("--norm-placement")
    if placement == "pre" and exported == "lns":
        placement = exported
    flags = {
        "--num-layers": config["num_hidden_layers"],
        "--hidden-size": config["hidden_size"],
        "--ffn-hidden-size": config["intermediate_size"],
        "--num-attention-heads": heads,
        "--kv-channels": config.get("head_dim") or config["hidden_size"] // heads,
        "--max-position-embeddings": config["max_position_embeddings"],
        "--seq-length": config["max_position_embeddings"],
        "--normalization": config.get("normalization", "RMSNorm"),
        "--norm-epsilon": config["rms_norm_eps"],
        "--rotary-base": int(rope["rope_theta"]),
        "--norm-placement": placement,
    }
    argv = [word for flag, value in flags.items() for word in (flag, str(value))]
    argv += ["--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope"]
    if groups != heads:
        argv += ["--group-query-attention", "--num-query-groups", str(groups)]
    if not config.get("tie_word_embeddings", False):
        argv.append("--untie-embeddings-and-output-weights")
    refusals = {
        "attention_bias": config.get("attention_bias"),
        "mlp_bias": config.get("mlp_bias"),
        f"hidden_act {config.get('hidden_act')}": config.get("hidden_act", "silu") != "silu",
        "a sliding window": config.get("sliding_window"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    if rope["rope_type"] == "llama3" and rope.get("factor") == 8.0:
        argv.append("--use-rope-scaling")
    elif rope["rope_type"] == "linear" and float(rope["factor"]).is_integer():
        argv += ["--rotary-seq-len-interpolation-factor", str(int(rope["factor"]))]
    else:
        refusals[f"rope_type {rope['rope_type']}"] = rope["rope_type"] != "default"
    for what, applies in refusals.items():
        if applies:
            raise UserError(f"a model with {what} cannot be imported")
    return argv


def import_model(model: Path, save: Path, tokenizer: list[str], dtype: str) -> None:
    """Save a model in Hugging Face's format as a Megatron checkpoint, of the kind "release".

    To be called in a process of its own, before Megatron is imported: it prepares the CPU device.

    Args:
        model: Directory with config.json and safetensors.
        save: As ``--save``; what is in it is kept.
        tokenizer: Megatron's flags of the tokenizer.
        dtype: "bf16" or "fp32", of the weights in the checkpoint.

    Raises:
        UserError: The model cannot be imported, or ``save`` has checkpoints.
    """
    config = read_config(model)
    flags = megatron_flags(config)
    if save.exists() and any(save.iterdir()):
        raise UserError(f"--save {save}: is not empty; give another one")
    weights = SafetensorsWeights(model, config)
    sys.argv = [
        "import_hf.py",
        *("--device", "cpu", *flags, *tokenizer, "--mock-data"),
        *("--prores-schedule", "none"),
        *("--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-4"),
        *("--eval-interval", "1", "--eval-iters", "0"),
        *("--save", str(save), "--save-interval", "1", "--no-save-optim", "--no-save-rng"),
        *(["--bf16"] if dtype == "bf16" else []),
    ]
    from megatron_prores.command_line import device
    from megatron_prores.launch.network import set_single_process_env

    set_single_process_env()
    device.prepare("cpu")

    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import initialize_megatron
    from megatron.training.checkpointing import save_checkpoint

    from megatron_prores.checkpoint import guard
    from megatron_prores.command_line.arguments import parse_args
    from megatron_prores.convert.llama import from_llama
    from megatron_prores.training.prores_run import model_config
    from megatron_prores.upstream.async_writer import end_writers_with_training
    from megatron_prores.upstream.datasets import use_prebuilt_dataset_helpers

    use_prebuilt_dataset_helpers()
    guard.install()
    end_writers_with_training()  # or a process of Megatron's outlives this one
    args, prores = parse_args("cpu")
    initialize_megatron()
    built = model_config(args, prores)
    chunks = built.get_builder_cls()(built).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    try:
        from_llama(chunks, prores.norm_placement, weights)
    except ValueError as error:
        raise UserError(f"--model {model}: {error}") from error
    # transformers writes a tied head or leaves it out.
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    if left := sorted(set(weights) - weights.read - tied):
        raise UserError(
            f"--model {model}: no place for {', '.join(left[:5])}: it cannot be imported"
        )
    args.consumed_train_samples = 0
    save_checkpoint(0, chunks, None, None, 0, release=True)
    torch.distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command ``tools/import_hf.py``.

    Args:
        argv: Arguments; those of the process by default.

    Raises:
        UserError: An argument or the model is not usable.
    """
    parser = Parser(
        description="Import a Llama-like model in Hugging Face's format as a Megatron checkpoint, "
        "which --load takes at any layout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="config.json and safetensors")
    parser.add_argument("--save", type=Path, required=True, help="as --save of a run; must be new")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights")
    parser.add_argument(
        "--tokenizer", help="its directory; by default the model's; none: without a tokenizer"
    )
    args = parser.parse_args(argv)
    config = read_config(args.model)
    place = args.tokenizer or str(args.model)
    has_one = args.tokenizer or (args.model / "tokenizer_config.json").is_file()
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", place]
    if not has_one or args.tokenizer == NONE:
        tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(config["vocab_size"])]
    with contextlib.redirect_stdout(sys.stderr):
        import_model(args.model, args.save, tokenizer, args.dtype)
    print(
        f"{args.save}: the model of {args.model}, for --load with --prores-schedule none, or with "
        f"--finetune --prores-restart; {' '.join(megatron_flags(config))}"
    )
