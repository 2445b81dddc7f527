"""Where the norms of a transformer layer sit: the norm placements of the paper, as a table.

F is a branch (attention or MLP), N a norm, a the layer's alpha, L the layers of the whole model
(paper, section 3 and appendix; DeepNorm: Wang et al., arXiv 2203.00555; LayerNorm scaling:
Sun et al., arXiv 2502.05795). After the last layer every placement has the model's final norm.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prores.errors import Argument, ArgumentError


@dataclass(frozen=True)
class NormPlacement:
    """One way to place the norms around a branch."""

    formula: str
    """What a branch does to the residual stream x."""
    norm_input: bool = False
    """Whether a norm stands before the branch: F(N(x))."""
    branch_output_norm: bool = False
    """Whether a norm stands after the branch, before the addition: N2(F(..))."""
    post_norm: bool = False
    """Whether a norm stands after the addition: N(x + ..)."""
    deepnorm: bool = False
    """Whether the stream is enlarged before the addition, by d = (2L)^(1/4)."""
    scaled_norms: bool = False
    """Whether the norm weights of layer l start at 1 / sqrt(l)."""

    def stream_gain(self, num_layers: int) -> float:
        """Return d, the factor on the residual stream x before a branch is added to it."""
        return (2.0 * num_layers) ** 0.25 if self.deepnorm else 1.0

    @property
    def is_stock(self) -> bool:
        """Whether Megatron's own layer has its norms there."""
        return not (self.branch_output_norm or self.post_norm)


PLACEMENTS: dict[str, NormPlacement] = {
    "pre": NormPlacement("x + a F(N(x))", norm_input=True),
    "sandwich": NormPlacement("x + a N2(F(N1(x)))", norm_input=True, branch_output_norm=True),
    "post": NormPlacement("N(x + a F(x))", post_norm=True),
    "deepnorm": NormPlacement("N(d x + a F(x))", post_norm=True, deepnorm=True),
    "lns": NormPlacement("x + a F(N(x))", norm_input=True, scaled_norms=True),
}
"""Norm placements by their names."""


def placement_of(norm_placement: str) -> NormPlacement:
    """Return a norm placement by its name.

    Raises:
        ArgumentError: There is none of that name.
    """
    if norm_placement not in PLACEMENTS:
        raise ArgumentError(
            Argument("norm_placement", norm_placement),
            f": no such placement; choose one of {', '.join(PLACEMENTS)}",
        )
    return PLACEMENTS[norm_placement]
