"""The models that are measured, and Megatron's flags for them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_prores.environment import is_installed


@dataclass(frozen=True)
class Size:
    """A Llama-like model and its batch."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    seq_length: int
    micro_batch_size: int
    vocab_size: int

    @property
    def parameters(self) -> int:
        """Weights of the model, its norms, embedding and output head counted."""
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        layer = 4 * hidden * hidden + 3 * hidden * ffn + 2 * hidden
        return self.num_layers * layer + 2 * self.vocab_size * hidden + hidden


LAPTOP = Size(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=688,
    num_attention_heads=4,
    seq_length=128,
    micro_batch_size=2,
    vocab_size=4096,
)

PUBLISHED: dict[str, Size] = {
    # Layers, hidden size, ffn, heads, sequence length, micro-batch, vocabulary.
    "130M": Size(12, 768, 2048, 12, 1024, 32, 32000),
    "350M": Size(24, 1024, 2736, 16, 1024, 16, 32000),
    "1.3B": Size(24, 2048, 5632, 32, 1024, 8, 32000),
    "3B": Size(32, 2560, 6848, 32, 1024, 4, 32000),
    "7B": Size(32, 4096, 11008, 32, 1024, 4, 32000),
}
"""The paper's sizes (its table of runs). Micro-batches are those of ``examples/``, but for 7B,
where it is twice as large: fewer of its layers are on the GPU."""


def llama_flags(size: Size) -> list[str]:
    """Return Megatron's flags for the model, for random data, and for training without an end.

    Args:
        size: Its ``vocab_size`` is what Megatron's NullTokenizer gets, which adds one id.
    """
    flags = [
        *("--normalization", "RMSNorm", "--swiglu"),
        *("--disable-bias-linear", "--position-embedding-type", "rope"),
        *("--untie-embeddings-and-output-weights", "--attention-dropout", "0"),
        *("--hidden-dropout", "0", "--max-position-embeddings", str(size.seq_length)),
        *("--lr", "1e-4", "--lr-decay-style", "constant", "--train-iters", "1000000"),
        *("--eval-iters", "0", "--eval-interval", "1000000"),
        *("--mock-data", "--tokenizer-type", "NullTokenizer"),
    ]
    for field in fields(Size):
        flags += [f"--{field.name.replace('_', '-')}", str(getattr(size, field.name))]
    return flags


def implementation_flags(device: str) -> list[str]:
    """Return Megatron's flags for what is installed on this machine, as ``examples/`` set them.

    Megatron's defaults take Transformer Engine and Apex for granted.
    """
    if device == "cpu":
        return []
    flags: list[str] = []
    if not is_installed("transformer_engine"):
        flags += ["--transformer-impl", "local", "--no-persist-layer-norm"]
        flags += ["--no-masked-softmax-fusion"]
    if not is_installed("transformer_engine") or not is_installed(APEX_WGRAD):
        # The output head is Megatron's own linear layer, which stops without this kernel.
        flags.append("--no-gradient-accumulation-fusion")
    return flags


APEX_WGRAD = "fused_weight_gradient_mlp_cuda"
"""Apex's kernel that adds a weight gradient to the main gradient in one pass."""
