"""What is trained at which size: the runs of every figure and table, and their command lines.

A scaled run keeps the paper's ratios: the learning rate warms up over 2% of the steps (10% for
Post-LN and DeepNorm) and decays over the last 10%, T is 1% of the steps, weights are drawn with the
standard deviation that 0.02 is at the paper's width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_prores.launch.gpu_flags import Setup, gpu_flags
from megatron_prores.system.environment import is_installed
from studies.paper.recipes import PLACEMENTS

PLAIN = "plain"
LONG = "long"
"""Plain, the learning rate warming up for as long as ProRes does: the fair rival."""
PRORES = "prores"
ARMS = (PLAIN, LONG, PRORES)


@dataclass(frozen=True)
class Scale:
    """A size of models and runs."""

    name: str
    device: str
    """As ``--device``."""
    hidden: int
    ffn: int
    heads: int
    seq_length: int
    """Tokens."""
    batch: int
    """Sequences of an iteration."""
    micro_batch: int
    iterations: int
    vocabulary: int
    text_megabytes: int
    eval_batches: int
    """Of ``batch`` sequences, in each evaluation."""
    depths: tuple[int, ...]
    """Layers of the main comparison."""
    deep: tuple[int, ...]
    """Layers of the depth study, beyond those of the main comparison."""
    rates: tuple[tuple[int, float], ...]
    """Up to how many layers -> learning rate. The same for every arm."""
    seeds: int
    """Of the main comparison."""

    def learning_rate(self, layers: int) -> float:
        """Return the learning rate at a depth."""
        return next(rate for most, rate in self.rates if layers <= most)

    @property
    def init_std(self) -> float:
        """Standard deviation of the linear weights: 0.02 at the width of the 130M model."""
        return round(0.02 * math.sqrt(768 / self.hidden), 4)


LAPTOP = Scale(
    name="laptop",
    device="cpu",
    hidden=32,
    ffn=88,
    heads=2,
    seq_length=64,
    batch=8,
    micro_batch=8,
    iterations=1000,
    vocabulary=512,
    text_megabytes=8,
    eval_batches=64,
    depths=(12, 24),
    deep=(48,),
    rates=((24, 4e-3), (1000, 2e-3)),
    seeds=3,
)

GPU = replace(
    LAPTOP,
    name="gpu",
    device="cuda",
    hidden=512,
    ffn=1368,
    heads=8,
    seq_length=512,
    batch=64,
    micro_batch=16,
    vocabulary=8192,
    text_megabytes=200,
    eval_batches=16,
    deep=(48, 96),
    rates=((1000, 2e-3),),
)

MINUTES = replace(LAPTOP, name="minutes", iterations=700, eval_batches=32)
"""For a first look: examples/see_prores_work.sh."""

KIT = replace(GPU, name="kit", iterations=400, vocabulary=4096, text_megabytes=16, seeds=1)
"""For the first minutes on a GPU: docs/gpu_kit.md."""

SCALES = {scale.name: scale for scale in (MINUTES, LAPTOP, KIT, GPU)}


@dataclass(frozen=True, order=True)
class Run:
    """One training run of a scale."""

    placement: str
    """In the words of recipes.PLACEMENTS."""
    arm: str
    layers: int
    seed: int = 1
    schedule: str = "linear"
    """Of an arm with ProRes."""
    warmup: float = 0.01
    """T in iterations per layer, as a share of all; of an arm with ProRes."""
    norms: bool = False
    """Whether layer norms are logged, for Figure 3."""

    @property
    def name(self) -> str:
        """Return its directory's name."""
        words = [self.placement, str(self.layers), self.arm]
        if self.schedule != "linear" or self.warmup != 0.01:
            words += [self.schedule, f"{self.warmup:g}"]
        return "-".join([*words, *(["norms"] if self.norms else []), f"seed{self.seed}"])

    def lr_warmup(self) -> float:
        """Return the length of the learning rate's warmup as a share of the run."""
        if self.arm == LONG:
            return self.layers * self.warmup
        return 0.1 if self.placement in ("post", "deepnorm") else 0.02


def seeded(runs: Iterable[Run], scale: Scale) -> list[Run]:
    """List runs with every seed of a scale."""
    return [replace(run, seed=seed) for run in runs for seed in range(1, scale.seeds + 1)]


def main_comparison(scale: Scale) -> list[Run]:
    """List the runs of Pre-LN and Post-LN with every arm: Table 2 and Figures 2 and 5."""
    cases = itertools.product(("post", "pre"), scale.depths, ARMS)
    return seeded((Run(placement, arm, layers) for placement, layers, arm in cases), scale)


def placements(scale: Scale) -> list[Run]:
    """List the runs of the paper's other placements and initial weights: the rest of Table 2."""
    others = [each for each in PLACEMENTS if each not in ("pre", "post")]
    cases = itertools.product(others, (PLAIN, PRORES))
    return seeded((Run(placement, arm, scale.depths[0]) for placement, arm in cases), scale)


def depth_study(scale: Scale) -> list[Run]:
    """List the runs of Figure 1 beyond the main comparison."""
    cases = itertools.product(("post", "pre"), scale.deep, ARMS)
    return seeded((Run(placement, arm, layers) for placement, layers, arm in cases), scale)


def ablation(scale: Scale) -> list[Run]:
    """List the runs of Table 6 beyond the main comparison: schedules, and lengths of linear."""
    base = Run("post", PRORES, scale.depths[0])
    lengths = [replace(base, warmup=share) for share in (0.0025, 0.005, 0.02, 0.04)]
    schedules = "linear_sqrt linear_square equal reverse stagewise_L fix_sqrt_l".split()
    return seeded([*lengths, *(replace(base, schedule=name) for name in schedules)], scale)


def layer_norms(scale: Scale) -> list[Run]:
    """List the runs of Figures 3 and 4: Pre-LN, layer norms logged."""
    return [Run("pre", arm, scale.depths[-1], norms=True) for arm in (PLAIN, PRORES)]


def first_look(scale: Scale) -> list[Run]:
    """List two runs that differ where it shows soonest: deep Post-LN, plain and with ProRes."""
    return [Run("post", arm, scale.depths[-1]) for arm in (PLAIN, PRORES)]


def short_comparison(scale: Scale) -> list[Run]:
    """List the fewest runs that compare both placements with and without ProRes."""
    cases = itertools.product(("pre", "post"), (PLAIN, PRORES))
    return [Run(placement, arm, scale.depths[0]) for placement, arm in cases]


EXHIBITS = {
    "see": (first_look,),
    "short": (short_comparison,),
    "table2": (main_comparison, placements),
    "table6": (main_comparison, ablation),
    "figure1": (main_comparison, depth_study),
    "figure2": (main_comparison,),
    "figure3": (layer_norms,),
    "figure4": (layer_norms,),
    "figure5": (main_comparison,),
    "main": (main_comparison,),
    "all": (main_comparison, layer_norms, depth_study, placements, ablation),
}
"""Figure or table -> the lists of runs that it is made of."""


def runs_of(exhibit: str, scale: Scale) -> list[Run]:
    """List the runs of a figure or table, each once: those of one seed before the next seed's."""
    runs = dict.fromkeys(run for each in EXHIBITS[exhibit] for run in each(scale))
    return sorted(runs, key=lambda run: run.seed)


def flags(run: Run, scale: Scale, data: Path, directory: Path) -> list[str]:
    """Build the main program's command line of a run.

    Args:
        run: The run.
        scale: Its size.
        data: Directory of the tokenized text.
        directory: Of the run.
    """
    steps = scale.iterations
    placement = f"--norm-placement {run.placement}"
    if run.placement in ("scaled", "ds"):
        placement = f"--norm-placement pre --branch-init {run.placement}"
    words = f"""
        --device {scale.device} --num-layers {run.layers} --hidden-size {scale.hidden}
        --ffn-hidden-size {scale.ffn} --num-attention-heads {scale.heads}
        --seq-length {scale.seq_length} --max-position-embeddings {scale.seq_length}
        --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
        --position-embedding-type rope --untie-embeddings-and-output-weights
        --attention-dropout 0 --hidden-dropout 0 --init-method-std {scale.init_std}
        --make-vocab-size-divisible-by 128 {placement} --seed {run.seed}
        --micro-batch-size {scale.micro_batch} --global-batch-size {scale.batch}
        --train-iters {steps} --lr {scale.learning_rate(run.layers)} --min-lr 0
        --lr-decay-style WSD --lr-warmup-iters {round(run.lr_warmup() * steps)}
        --lr-wsd-decay-style linear --lr-wsd-decay-iters {steps // 10}
        --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --clip-grad 1.0
        --eval-interval {steps // 5} --eval-iters {scale.eval_batches} --num-workers 0
        --log-interval 1 --save-interval {steps // 10}
        --tokenizer-type SentencePieceTokenizer
    """.split()
    words += ["--prores-schedule", run.schedule if run.arm == PRORES else "none"]
    if run.arm == PRORES and not run.schedule.startswith("fix_"):
        # W is the same for every schedule of a depth, as in the paper's ablation.
        words += ["--prores-warmup-iters", str(round(run.warmup * steps * run.layers))]
    if scale.device == "cuda":
        words += ["--bf16", "--use-distributed-optimizer"]
        setup = Setup(
            transformer_engine=is_installed("transformer_engine"),
            apex=is_installed("fused_weight_gradient_mlp_cuda"),
        )
        words += gpu_flags(setup)
    if run.norms:
        words += ["--log-layer-norms-interval", str(max(1, steps // 100))]
    for flag, path in {
        "--tokenizer-model": data / "tokenizer.model",
        "--train-data-path": data / "train_text_document",
        "--valid-data-path": data / "valid_text_document",
        "--data-cache-path": data / "cache",
        "--save": directory / "checkpoints",
        "--load": directory / "checkpoints",
        "--tensorboard-dir": directory / "tensorboard",
    }.items():
        words += [flag, str(path)]
    return words
