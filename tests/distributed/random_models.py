"""Random small models for the CPU device: flags of every kind, each set of them a valid run."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from megatron_prores.config.placement import PLACEMENTS
from megatron_prores.config.prores_config import BRANCH_INITS, OFF
from megatron_prores.schedule.formulas import SCHEDULES
from tests.distributed.random_layouts import Constraints, Layout, layouts

# Float32, where layouts differ by rounding alone; dropout draws other numbers on another layout.
COMMON = """
    --device cpu --mock-data --tokenizer-type NullTokenizer --num-workers 0
    --attention-dropout 0 --hidden-dropout 0 --lr 5e-3 --lr-decay-style constant
    --log-interval 1 --eval-interval 2 --eval-iters 1 --log-params-norm --no-load-rng
    --dist-ckpt-optim-fully-reshardable
""".split()

# The padded vocabulary is 96 on one tensor rank, on two and on three.
VOCABULARY = 81, 96
PADDING = ("--make-vocab-size-divisible-by", "16")

Flags = tuple[str, ...]


@dataclass(frozen=True)
class RandomModel:
    """One model, its warmup, and the layout to compare with one rank."""

    num_layers: int
    model: Flags
    warmup: Flags
    layout: Layout
    schedule: str
    total_warmup: int
    """In steps of the schedule: iterations, or samples."""
    steps_per_iteration: int
    """Steps of the schedule in an iteration: 1, or the global batch."""

    @property
    def features(self) -> frozenset[str]:
        """Names what this model is an example of: its flags, with the values that are words."""
        found: set[str] = set()
        words = (*self.model, *self.warmup, *self.layout.flags)
        flag = ""
        for word in words:
            if word.startswith("--"):
                flag = word
                found.add(flag)
            elif (
                flag.endswith("-parallel-size")
                or word.replace("-", "").isalpha()
                or word.isidentifier()
            ):
                found.add(f"{flag} {word}")
            elif flag == "--pipeline-model-parallel-layout":
                stages = word.split("|")
                found |= {f"{flag} of {len(stages)} stages"}
                found |= {f"stage of {part}" for part in ("E", "L", "") if part in stages}
                found |= {"stage of m" for stage in stages if stage and not stage.strip("m")}
        return frozenset(found | {f"{self.layout.ranks} ranks"})


@st.composite
def random_models(draw: st.DrawFn) -> RandomModel:
    """Draws a model that trains on the layout drawn with it."""
    schedule = draw(st.sampled_from((OFF, *SCHEDULES)))
    placement = draw(st.sampled_from(sorted(PLACEMENTS)))
    # Megatron's prediction layers have their norms before the branches.
    mtp_layers = draw(st.sampled_from((0, 0, 1, 2))) if PLACEMENTS[placement].is_stock else 0
    constraints = Constraints(
        num_layers=draw(st.integers(2, 6)),
        experts=draw(st.integers(0, 2)) == 0,
        mtp_layers=mtp_layers,
        prores=schedule != OFF,
        tied=draw(st.booleans()),
    )
    layout = draw(layouts(constraints))
    micro_batch = draw(st.sampled_from((1, 2)))
    # Divides over data-parallel ranks, and into whole rounds of a pipeline with virtual stages.
    global_batch = micro_batch * layout.ranks * draw(st.sampled_from((1, 2)))
    sequence = draw(st.sampled_from((12, 24)))
    model: Flags = (
        *("--num-layers", str(constraints.num_layers)),
        *("--micro-batch-size", str(micro_batch), "--global-batch-size", str(global_batch)),
        *("--seq-length", str(sequence)),
        *("--vocab-size", str(draw(st.integers(*VOCABULARY))), *PADDING),
        # Small weights leave experts that suit a token almost equally well.
        *(
            "--init-method-std",
            str(0.1 if constraints.experts else draw(st.sampled_from((0.02, 0.1)))),
        ),
        *draw(_attention(layout, mtp_layers, sequence)),
        *draw(_norms_and_weights(placement)),
        *([] if constraints.tied else ["--untie-embeddings-and-output-weights"]),
        *draw(_feed_forward(layout, constraints)),
    )
    if mtp_layers:
        model += ("--mtp-num-layers", str(mtp_layers))
    for flag in ("--use-distributed-optimizer", "--calculate-per-token-loss"):
        if draw(st.booleans()):
            model += (flag,)
    unit = draw(st.sampled_from(("iters", "iters-per-layer", "samples")))
    length = draw(st.integers(1, 30))
    steps = 1
    if unit == "samples":
        steps, length = global_batch, length * global_batch + draw(st.integers(0, 1))
    warmup: Flags = ("--prores-schedule", schedule, f"--prores-warmup-{unit}", str(length))
    total = length * constraints.num_layers if unit == "iters-per-layer" else length
    return RandomModel(constraints.num_layers, model, warmup, layout, schedule, total, steps)


@st.composite
def _attention(draw: st.DrawFn, layout: Layout, mtp_layers: int, sequence: int) -> Flags:
    """Draws the width, and everything of attention; every head size is even, for RoPE."""
    hidden = draw(st.sampled_from((24, 48)))
    heads = layout.tensor * draw(st.sampled_from((1, 2)))
    flags: Flags = ("--hidden-size", str(hidden), "--num-attention-heads", str(heads))
    if draw(st.booleans()):
        flags += ("--kv-channels", str(draw(st.sampled_from((4, 8, 12)))))
    groups = [n for n in range(1, heads + 1) if heads % n == 0]
    groups = [n for n in groups if n % layout.tensor == 0 or layout.tensor % n == 0]
    # Ranks that share a group share the rows of its queries, key and value evenly.
    groups = [n for n in groups if n % layout.tensor == 0 or (heads + 2 * n) % layout.tensor == 0]
    if draw(st.booleans()):
        number = draw(st.sampled_from(groups))
        flags += ("--group-query-attention", "--num-query-groups", str(number))
    # Of Megatron's other kinds of positions none is meant for a decoder on a CPU.
    # They are "rope" and "none" alone where there are prediction layers.
    positions = draw(st.sampled_from(("rope", "none", *["learned_absolute"] * (not mtp_layers))))
    flags += ("--position-embedding-type", positions)
    longer = draw(st.sampled_from((0, 0, 10)))
    flags += ("--max-position-embeddings", str(sequence + longer))
    if positions == "rope":
        flags += ("--rotary-percent", draw(st.sampled_from(("1.0", "0.5"))))
        if draw(st.booleans()):
            flags += ("--rotary-interleaved",)
    flags += ("--attention-backend", draw(st.sampled_from(("fused", "unfused"))))
    # On a CPU Megatron's own norms, of queries and keys as well, refuse sequence parallelism.
    if "--sequence-parallel" not in layout.flags and draw(st.booleans()):
        flags += ("--qk-layernorm",)
    if draw(st.integers(0, 2)) == 0:
        flags += ("--add-qkv-bias",)
    softmax = draw(st.sampled_from(("vanilla", "vanilla", "off-by-one", "learnable")))
    if softmax != "vanilla":
        flags += ("--softmax-type", softmax)
    return flags


@st.composite
def _norms_and_weights(draw: st.DrawFn, placement: str) -> Flags:
    flags: Flags = ("--norm-placement", placement)
    flags += ("--normalization", draw(st.sampled_from(("RMSNorm", "LayerNorm"))))
    flags += ("--branch-init", draw(st.sampled_from(BRANCH_INITS)))
    return (*flags, "--embedding-weight-decay") if draw(st.booleans()) else flags


@st.composite
def _feed_forward(draw: st.DrawFn, layout: Layout, model: Constraints) -> Flags:
    widths = st.sampled_from((12, 24, 36))
    flags: Flags = ("--ffn-hidden-size", str(draw(widths)))
    activation = draw(st.sampled_from(("", "--swiglu", "--squared-relu")))
    flags += (activation,) if activation else ()
    # Megatron knows biases of experts only where an expert is whole, and then not on this device's
    # way of handing tokens to them. It cannot recompute an MLP with biases.
    if model.experts or "mlp" in layout.flags or draw(st.booleans()):
        flags += ("--disable-bias-linear",)
    return flags + draw(_experts(layout, model.num_layers)) if model.experts else flags


@st.composite
def _experts(draw: st.DrawFn, layout: Layout, num_layers: int) -> Flags:
    by_three = layout.ranks == 3 and "--expert-model-parallel-size" in layout.flags
    number = draw(st.sampled_from((3, 6) if by_three else (2, 4)))
    flags: Flags = ("--num-experts", str(number), "--moe-token-dispatcher-type", "allgather")
    score = draw(st.sampled_from(("softmax", "sigmoid")))
    top = draw(st.sampled_from((1, 2)))
    flags += ("--moe-router-topk", str(top), "--moe-router-score-function", score)
    # One expert alone would always weigh 1 if the softmax came after the choice.
    if score == "softmax" and (top == 1 or draw(st.booleans())):
        flags += ("--moe-router-pre-softmax",)
    if score == "sigmoid" and draw(st.booleans()):
        flags += ("--moe-router-enable-expert-bias",)
    balancing = draw(st.sampled_from(("none", "aux_loss", "seq_aux_loss")))
    flags += ("--moe-router-load-balancing-type", balancing)
    flags += ("--moe-aux-loss-coeff", "0.01") if balancing != "none" else ()
    if draw(st.booleans()):
        flags += ("--moe-z-loss-coeff", "0.001")
    flags += ("--moe-ffn-hidden-size", str(draw(st.sampled_from((12, 24)))))
    if draw(st.booleans()):
        flags += ("--moe-shared-expert-intermediate-size", str(draw(st.sampled_from((12, 24)))))
    frequency = draw(st.sampled_from(("1", "2", "first dense")))
    if frequency == "first dense":
        frequency = f"([0]+[1]*{num_layers - 1})"
    return (*flags, "--moe-layer-freq", frequency)


def draw_models(number: int, from_seed: int) -> list[RandomModel]:
    """Draws ``number`` models, the same ones for the same number and seed.

    Hypothesis draws a pool of somewhat more. Of these each is the one that brings the most features
    that none before had, over and over, so that a few show much, and rare features are not rare.
    """
    drawn: list[RandomModel] = []
    for part in range(max(3, number // 20)):

        @seed(f"{from_seed}, part {part}")
        @settings(
            max_examples=30,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(random_models())
        def collect(model: RandomModel) -> None:
            drawn.append(model)

        collect()
    # In each part hypothesis begins with the simplest, and stays near what it has had.
    pool = list(dict.fromkeys(drawn))
    random.Random(from_seed).shuffle(pool)
    everything = frozenset[str]().union(*(model.features for model in pool))
    ordered: list[RandomModel] = []
    shown: frozenset[str] = frozenset()
    while pool and len(ordered) < number:
        best = max(pool, key=lambda model: len(model.features - shown))
        pool.remove(best)
        ordered.append(best)
        shown |= best.features
        if shown == everything:
            shown = frozenset()
    return ordered
