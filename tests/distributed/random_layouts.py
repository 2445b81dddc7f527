"""Random layouts of at most three ranks, each of which Megatron accepts for the model at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement, pairwise

from hypothesis import strategies as st


@dataclass(frozen=True)
class Layout:
    """Flags that say where a model's parts are, on how many ranks."""

    ranks: int
    flags: tuple[str, ...] = ()
    tensor: int = 1
    """Tensor-parallel size, which widths must divide by."""

    @property
    def own_optimizer(self) -> bool:
        """Whether experts have an optimizer of their own, which one rank cannot load."""
        return any(flag.startswith("--expert-") for flag in self.flags)


@dataclass(frozen=True)
class Constraints:
    """What a layout must know of its model, drawn before the model's widths."""

    num_layers: int
    experts: bool
    mtp_layers: int
    prores: bool
    """Whether there is a schedule."""
    tied: bool
    """Whether the embedding is the output head as well."""


@st.composite
def layouts(draw: st.DrawFn, model: Constraints) -> Layout:
    """Draws a layout of two or three ranks, or of one that recomputes."""
    # On a CPU Megatron's own norms refuse sequence parallelism: those of a model without ProRes,
    # and of prediction layers. A model with experts trains on tensor ranks with nothing else.
    sequence_parallel = model.prores and not model.mtp_layers
    kinds = ["one rank", "data", "string", "string"]
    # Megatron cannot save prediction layers on one stage with a tied output head.
    if not (model.tied and model.mtp_layers):
        kinds += [kind for kind in _CUTS if _ranks_for(kind, model.num_layers)]
        kinds += ["virtual"] * bool(_ranks_for("virtual", model.num_layers))
    if sequence_parallel or not model.experts:
        kinds += ["tensor", "tensor"]
    if model.experts:
        kinds += ["experts", "experts"]
    kind = draw(st.sampled_from(kinds))
    if kind == "one rank":
        layout = Layout(1)
    elif kind == "data":
        layout = Layout(draw(st.sampled_from((2, 3))), _data(draw))
    elif kind == "tensor":
        layout = _tensor(draw, model, sequence_parallel)
    elif kind == "experts":
        layout = _experts(draw)
    else:
        layout = _pipeline(draw, model, kind)
    recompute = _recompute(draw, model, layout)
    return Layout(layout.ranks, (*layout.flags, *recompute), layout.tensor)


def _size(name: str, size: int) -> tuple[str, str]:
    return f"--{name}-parallel-size", str(size)


def _data(draw: st.DrawFn) -> tuple[str, ...]:
    return ("--overlap-grad-reduce",) if draw(st.booleans()) else ()


def _tensor(draw: st.DrawFn, model: Constraints, sequence_parallel: bool) -> Layout:
    ranks = draw(st.sampled_from((2, 3)))
    flags = _size("tensor-model", ranks)
    if sequence_parallel and (model.experts or draw(st.booleans())):
        flags += ("--sequence-parallel",)
    if model.experts:
        # Experts cut as everything else is, whole ones, or whole ones spread over the ranks.
        experts = draw(st.sampled_from(("cut", "whole", "spread")))
        flags += _size("expert-tensor", 1) if experts != "cut" else ()
        flags += _size("expert-model", ranks) if experts == "spread" else ()
    return Layout(ranks, flags, ranks)


def _experts(draw: st.DrawFn) -> Layout:
    """Experts on different data-parallel ranks, or each of them cut over two such ranks."""
    ranks = draw(st.sampled_from((2, 3)))
    if draw(st.booleans()):
        return Layout(ranks, _size("expert-tensor", ranks))
    return Layout(ranks, _size("expert-model", ranks))


def _pipeline(draw: st.DrawFn, model: Constraints, kind: str) -> Layout:
    if kind == "string":
        # On two ranks prediction layers are always on one stage with the output head.
        three_alone = model.tied and model.mtp_layers
        ranks = draw(st.sampled_from((3,) if three_alone else (2, 3)))
        cuts = _strings(model.num_layers, model.mtp_layers, model.tied, ranks)
    else:
        ranks = draw(st.sampled_from(_ranks_for(kind, model.num_layers)))
        cuts = list(_CUTS[kind](model.num_layers, ranks))
    return Layout(ranks, _size("pipeline-model", ranks) + draw(st.sampled_from(cuts)))


def _even(layers: int, ranks: int) -> Iterator[tuple[str, ...]]:
    if layers % ranks == 0:
        yield ()


def _virtual(layers: int, ranks: int) -> Iterator[tuple[str, ...]]:
    for stages in (2, 3):
        if layers % (ranks * stages) == 0:
            yield "--num-virtual-stages-per-pipeline-rank", str(stages)
            yield (
                "--num-layers-per-virtual-pipeline-stage",
                str(layers // (ranks * stages)),
            )


def _uneven(layers: int, ranks: int) -> Iterator[tuple[str, ...]]:
    first, last = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
    for number in range(1, layers):
        rest = layers - number
        if rest % (ranks - 1) == 0:
            yield first, str(number)
            yield last, str(number)
        for other in range(1, rest + 1):
            middle = rest - other
            if (middle == 0 and ranks == 2) or (middle > 0 and ranks == 3):
                yield first, str(number), last, str(other)


def _accounted(layers: int, ranks: int) -> Iterator[tuple[str, ...]]:
    embedding, loss = (f"--account-for-{part}-in-pipeline-split" for part in ("embedding", "loss"))
    for flags in ((embedding,), (loss,), (embedding, loss)):
        # A stage of nothing but the embedding, or the loss, is one of the strings below.
        if (layers + len(flags)) % ranks == 0 and (layers + len(flags)) // ranks >= 2:
            yield flags


@cache
def _strings(layers: int, mtp_layers: int, tied: bool, ranks: int) -> list[tuple[str, ...]]:
    """Lists every --pipeline-model-parallel-layout that Megatron has room for.

    The prediction layers stay together, in the last virtual stage of a rank other than the
    embedding's. One stage at most is empty, if its rank has another.
    """
    predictions = ["m" * mtp_layers] if mtp_layers else []
    parts = ["E", *"t" * layers, *predictions, "L"]
    found: list[tuple[str, ...]] = []
    for virtual in (1, 2):
        count = ranks * virtual
        for cuts in combinations_with_replacement(range(1, len(parts)), count - 1):
            stages = ["".join(parts[a:b]) for a, b in pairwise((0, *cuts, len(parts)))]
            predicting = next((n for n, stage in enumerate(stages) if "m" in stage), count - 1)
            every_rank_has_some = all(any(stages[rank::ranks]) for rank in range(ranks))
            if (
                stages.count("") <= 1
                and every_rank_has_some
                and predicting >= count - ranks
                and predicting % ranks != 0
                and not (tied and "mL" in stages[-1])
            ):
                found.append(("--pipeline-model-parallel-layout", "|".join(stages)))
    return found


_CUTS = {
    "even": _even,
    "virtual": _virtual,
    "uneven": _uneven,
    "accounted": _accounted,
}


def _ranks_for(kind: str, layers: int) -> list[int]:
    """Lists the numbers of ranks for which these layers can be cut that way."""
    return [ranks for ranks in (2, 3) if list(_CUTS[kind](layers, ranks))]


def _recompute(draw: st.DrawFn, model: Constraints, layout: Layout) -> tuple[str, ...]:
    choices = ["none", "none", "full", "modules"] if layout.ranks > 1 else ["full", "modules"]
    kind = draw(st.sampled_from(choices))
    if kind == "full":
        method = draw(st.sampled_from(("uniform", "block")))
        flags = ("--recompute-granularity", "full", "--recompute-method", method)
        return (*flags, "--recompute-num-layers", "1")
    if kind == "modules":
        modules = ["core_attn", "mlp"]
        if model.experts:
            modules += ["moe", "shared_experts"]
        chosen = draw(st.lists(st.sampled_from(modules), min_size=1, max_size=2, unique=True))
        return ("--recompute-granularity", "selective", "--recompute-modules", *chosen)
    return ()
