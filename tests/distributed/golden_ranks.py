"""What the golden tests run in each rank: the authors' weights and tokens in Megatron's model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests import golden


def _transformer_config(weights: dict[str, Any], **layout: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    meta = golden.load_json("meta.json")
    channels = meta["hidden_size"] // meta["num_attention_heads"]
    key_rows = weights["model.layers.0.self_attn.k_proj.weight"].shape[0]
    values: dict[str, Any] = {
        "num_layers": meta["num_layers"],
        "hidden_size": meta["hidden_size"],
        "ffn_hidden_size": meta["ffn_hidden_size"],
        "num_attention_heads": meta["num_attention_heads"],
        "num_query_groups": key_rows // channels,
        "layernorm_epsilon": meta["rms_norm_eps"],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "transformer_impl": "local",
    }
    return TransformerConfig(**values | layout)


def _device() -> torch.device:
    """Where "cuda" leads to: the CPU, on the CPU device."""
    return torch.empty(0, device="cuda").device


def _build(case: str, weights: dict[str, Any], layout: dict[str, Any]) -> list[Any]:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelConfig
    from megatron.training.models.hybrid import HybridModelConfig

    from megatron_prores.config.prores_config import ProResConfig
    from megatron_prores.convert.llama import from_llama
    from megatron_prores.training.model import set_layers

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if _device().type == "cuda" else "gloo")
        parallel_state.initialize_model_parallel(
            layout.get("tensor_model_parallel_size", 1),
            layout.get("pipeline_model_parallel_size", 1),
        )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    meta = golden.load_json("meta.json")
    layout = dict(layout)
    pattern = layout.pop("hybrid_layer_pattern", None)
    if pattern is not None:
        layout |= {"num_layers": 2 * meta["num_layers"], "is_hybrid_model": True}
    config = _transformer_config(weights, **layout)
    values = {
        "transformer": config,
        "vocab_size": meta["vocab_size"],
        "seq_length": meta["seq_length"],
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
    }
    model: Any = (
        GPTModelConfig(**values)
        if pattern is None
        else HybridModelConfig(**values, hybrid_layer_pattern=pattern)
    )
    set_layers(model, ProResConfig(norm_placement=golden.placement(case)))
    chunks = model.get_builder_cls()(model).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=DistributedDataParallelConfig(),
    )
    config.finalize_model_grads_func = finalize_model_grads
    from_llama(chunks, golden.placement(case), {k: torch.tensor(v) for k, v in weights.items()})
    _never_train_padding(chunks)
    return chunks


def _never_train_padding(chunks: list[Any]) -> None:
    """Drops the gradient of one token's embedding, as the ``padding_idx`` of the authors' does."""

    def drop(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        first = parallel_state.get_tensor_model_parallel_rank() * len(gradient)
        if first <= golden.PADDING_TOKEN < first + len(gradient):
            gradient[golden.PADDING_TOKEN - first] = 0.0
        return gradient

    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    for chunk in unwrap_model(chunks):
        if hasattr(chunk, "embedding"):
            chunk.embedding.word_embeddings.weight.register_hook(drop)


def _array(tensor: torch.Tensor) -> Any:
    return tensor.detach().float().cpu().numpy()


def _set_alphas(chunks: list[Any]) -> None:
    from megatron_prores.model.layer import ProResLayerMixin

    probe = golden.load_json("meta.json")["alpha_probe"]
    for chunk in chunks:
        for layer in chunk.modules():
            if isinstance(layer, ProResLayerMixin):
                assert layer.prores_layer is not None
                layer.set_alpha(probe[layer.prores_layer - 1])


def _forward_step(with_labels: bool, data_iterator: Any, model: Any) -> tuple[Any, Any]:
    tokens = torch.tensor(golden.load_arrays("forward_tokens.npz")["tokens"]).long().cuda()
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    output = model(inputs, positions, None, labels=labels if with_labels else None)

    def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return losses.mean(), losses.mean().detach()

    return output, mean_loss if with_labels else None


def run_forward_case(case: str, layout: dict[str, Any], directory: str, fold: bool = False) -> None:
    """Computes logits, loss and gradients of one case and leaves them as files, one per stage.

    With ``fold``, alpha is folded into the weights and every layer is open.
    """
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_prores.convert.llama import fold_alphas, to_llama

    meta = golden.load_json("meta.json")
    weights = golden.parameters("forward", case)
    if fold:
        weights = fold_alphas(weights, golden.placement(case), meta["alpha_probe"])
    chunks = _build(case, weights, layout)
    if golden.has_prores(case) and not fold:
        _set_alphas(chunks)
    arguments = {
        "data_iterator": None,
        "model": chunks,
        "num_microbatches": 1,
        "seq_length": meta["seq_length"],
        "micro_batch_size": meta["batch"],
    }
    schedule = get_forward_backward_func()
    with torch.no_grad():
        logits = schedule(
            forward_step_func=partial(_forward_step, False), forward_only=True, **arguments
        )
    for chunk in chunks:
        chunk.zero_grad_buffer()
    losses = schedule(
        forward_step_func=partial(_forward_step, True), forward_only=False, **arguments
    )
    gradients = to_llama(
        chunks, golden.placement(case), meta["vocab_size"], read=lambda p: p.main_grad
    )
    results = {f"gradient {name}": _array(gradient) for name, gradient in gradients.items()}
    if parallel_state.is_pipeline_last_stage():
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits[0])
        results |= {"logits": _array(whole), "loss": _array(losses[0])}
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        np.savez(Path(directory, f"stage{stage}.npz"), **results)


def run_forward_cases(
    cases: list[str], layout: dict[str, Any], directory: str, fold: bool = False
) -> None:
    """Computes several cases, one after the other, each into a folder of its own."""
    for case in cases:
        place = Path(directory, case)
        place.mkdir(exist_ok=True)
        print(f"case {case}", flush=True)
        run_forward_case(case, layout, str(place), fold)


def start_from_golden_weights(case: str) -> None:
    """Replaces data and initial weights of the main program by the authors', and nothing else."""
    from megatron_prores.convert.llama import from_llama
    from megatron_prores.model import initial_weights as init
    from megatron_prores.training import gpt

    tokens = golden.load_arrays("train_data.npz")["tokens"]

    class GoldenTokens(torch.utils.data.Dataset[Any]):
        """The sequences of all steps, one after the other."""

        def __len__(self) -> int:
            return int(tokens.shape[0] * tokens.shape[1])

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            sequence = torch.tensor(tokens.reshape(-1, tokens.shape[-1])[index]).long()
            return {
                "tokens": sequence[:-1],
                "labels": sequence[1:],
                "loss_mask": torch.ones(len(sequence) - 1),
                "position_ids": torch.arange(len(sequence) - 1),
            }

    def provider(num_samples: Any, vp_stage: int | None = None) -> tuple[Any, None, None]:
        return GoldenTokens(), None, None

    provider.is_distributed = True  # type: ignore[attr-defined]
    gpt.train_valid_test_datasets_provider = provider  # type: ignore[assignment]

    weights = golden.parameters("train", case)

    def finish(chunks: list[Any], prores: Any) -> None:
        from_llama(chunks, prores.norm_placement, {k: torch.tensor(v) for k, v in weights.items()})
        _never_train_padding(chunks)

    init.finish = finish


def start(argv: list[str]) -> tuple[Any, Any]:
    """Reads a command line and starts Megatron as the main program does; its two configurations."""
    import sys

    from megatron.training import initialize_megatron

    from megatron_prores.command_line.arguments import parse_args, read_prores_flags
    from megatron_prores.upstream.datasets import use_prebuilt_dataset_helpers

    sys.argv = ["pretrain_gpt_prores.py", *argv]
    _, device = read_prores_flags(argv)
    use_prebuilt_dataset_helpers()
    args, prores = parse_args(device)
    initialize_megatron()
    return args, prores


def build_chunks(args: Any, prores: Any) -> list[Any]:
    """Builds this rank's part of the model as the main program does."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_prores.training.prores_run import model_config

    config = model_config(args, prores)
    return config.get_builder_cls()(config).build_distributed_models(  # type: ignore[no-any-return]
        ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )


def write_initial_statistics(argv: list[str], vocab_size: int, directory: str) -> None:
    """Builds the model as the main program does and writes what its weights look like."""
    from megatron_prores.convert.llama import to_llama

    args, prores = start(argv)
    weights = to_llama(build_chunks(args, prores), prores.norm_placement, vocab_size)
    if torch.distributed.get_rank() == 0:
        np.savez(Path(directory, "weights.npz"), **{k: v.numpy() for k, v in weights.items()})
