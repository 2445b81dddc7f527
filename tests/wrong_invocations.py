"""The table of wrong invocations: of the main program, and of every tool.

To extend it, add a row. Every row ends, on all ranks and within 30 s, with exit code 2 and one line
on standard error that starts with "error: " and holds the row's words; without a traceback, and
with nothing written or changed. tests/refusals.py makes the files that rows name, and runs them:
those of FROM_OUTSIDE as a user starts them, in tests/unit/test_command_line.py, or with all ranks
at once; the others one after the other in one process. Both of the latter are in
tests/distributed/test_wrong_invocations.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAIN = "pretrain_gpt_prores.py"
PREPROCESS = "tools/preprocess_data.py"
CHECKPOINT = "tools/checkpoint.py"
DOCTOR = "-m megatron_prores.doctor"
BENCHMARK = "-m studies.benchmark"

# "{w}" is the directory with the prepared files.
_SIZE = """
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --micro-batch-size 1 --train-iters 2 --lr 1e-3 --eval-iters 0
    --eval-interval 1 --save-interval 1 --num-workers 0
"""
_NULL = "--tokenizer-type NullTokenizer --vocab-size 100"
_PIECES = "--tokenizer-type SentencePieceTokenizer --tokenizer-model {w}/pieces.model"
CPU = f"--device cpu {_SIZE}"
"""A model, without data and tokenizer."""
MOCK = f"{CPU} {_NULL} --mock-data"
"""A run that works, of two iterations."""
TEXT = f"{CPU} {_PIECES}"
"""The same, where the row names the data."""
SAVED = f"{CPU} {_NULL} --mock-data --load {{w}}/saved"
"""The same, from a checkpoint."""
TOKENIZE = f"--input {{w}}/text.jsonl --output-prefix out {_NULL} --workers 1"
"""A run of preprocess_data.py that works."""


@dataclass(frozen=True)
class Row:
    """One wrong invocation."""

    name: str
    """What is wrong; unique."""
    argv: str
    """The command line as it is typed."""
    words: tuple[str, ...]
    """What the one line must hold."""
    program: str = MAIN
    """Relative to the repository; or a module, after -m."""
    environment: Mapping[str, str] = field(default_factory=dict)
    ranks: int = 1
    without: tuple[str, ...] = ()
    """Flags, each with one value, that are taken out of ``argv`` again."""

    def __str__(self) -> str:
        return self.name


# Flags of ours. They are read before Megatron is imported.
_PRORES = (
    Row("unknown schedule", f"{MOCK} --prores-schedule cosine",
        ("--prores-schedule cosine", "linear")),
    Row("empty schedule", f"{MOCK} --prores-schedule=", ("--prores-schedule", "no such schedule")),
    Row("schedule file that is not there", f"{MOCK} --prores-schedule file:/nowhere/alpha.csv",
        ("--prores-schedule file:/nowhere/alpha.csv", "No such file")),
    Row("schedule file and a warmup",
        f"{MOCK} --prores-schedule file:{{w}}/alpha.csv --prores-warmup-iters 9",
        ("--prores-warmup-iters 9", "alpha.csv")),
    Row("schedule file for other layers", f"{MOCK} --prores-schedule file:{{w}}/alpha.csv",
        ("alpha.csv", "2 layers", "--num-layers")),
    Row("schedule file with an alpha above 1", f"{MOCK} --prores-schedule file:{{w}}/above.csv",
        ("above.csv", "line 2, layer 1: alpha 1.5")),
    Row("schedule file that is a directory", f"{MOCK} --prores-schedule file:{{w}}/folder.csv",
        ("folder.csv", "not a file")),
    Row("schedule file of another kind", f"{MOCK} --prores-schedule file:{{w}}/text.jsonl",
        ("text.jsonl", ".csv or .json")),
    Row("schedule module that is not there", f"{MOCK} --prores-schedule no_such_module:alphas",
        ("--prores-schedule no_such_module:alphas", "cannot import", "PYTHONPATH")),
    Row("schedule function that is not there", f"{MOCK} --prores-schedule math:no_such_function",
        ("--prores-schedule math:no_such_function", "not in it")),
    Row("schedule function with another signature", f"{MOCK} --prores-schedule math:sqrt",
        ("--prores-schedule math:sqrt", "at step 0, for 4 layers", "TypeError")),
    Row("the same, where Megatron alone knows the number of layers",
        f"{MOCK} --encoder-num-layers 4 --prores-schedule math:sqrt",
        ("--prores-schedule math:sqrt", "at step 0, for 4 layers", "TypeError"),
        without=("--num-layers",)),
    Row("negative warmup", f"{MOCK} --prores-warmup-iters -1", ("--prores-warmup-iters -1",),
        ranks=2),
    Row("no warmup per layer", f"{MOCK} --prores-warmup-iters-per-layer 0",
        ("--prores-warmup-iters-per-layer 0", "at least 1")),
    Row("warmup of no samples", f"{MOCK} --prores-warmup-samples 0",
        ("--prores-warmup-samples 0", "at least 1")),
    Row("warmup that is no number", f"{MOCK} --prores-warmup-iters many",
        ("--prores-warmup-iters", "many")),
    Row("two warmup lengths",
        f"{MOCK} --prores-warmup-iters 9 --prores-warmup-iters-per-layer 3",
        ("--prores-warmup-iters", "--prores-warmup-iters-per-layer", "give one")),
    Row("unknown norm placement", f"{MOCK} --norm-placement peri",
        ("--norm-placement peri", "sandwich")),
    Row("unknown initial weights", f"{MOCK} --branch-init zero", ("--branch-init zero", "scaled")),
    Row("two ways to initialise",
        f"{MOCK} --branch-init normal --use-mup --embedding-init-method-std 0.02",
        ("--use-mup", "--branch-init normal")),
    Row("two distributions to draw from",
        f"{MOCK} --init-method-truncated-normal --use-mup --embedding-init-method-std 0.02",
        ("--use-mup", "--init-method-truncated-normal")),
    Row("weights kept before they are rescaled", f"{MOCK} --branch-init ds --fp8-param-gather",
        ("--fp8-param-gather", "--branch-init ds")),
    Row("no weights to rescale", f"{MOCK} --branch-init ds --init-model-with-meta-device",
        ("--init-model-with-meta-device", "--branch-init ds")),
    Row("placement that has no place for it",
        f"{MOCK} --norm-placement post --bf16 --fp32-residual-connection",
        ("--fp32-residual-connection", "--norm-placement post")),
    *(
        Row(f"DeepNorm's gains and {flag.split()[0]}", f"{MOCK} --norm-placement deepnorm {flag}",
            (f"{flag.split()[0]} cannot be used with --branch-init deepnorm",))
        for flag in (
            "--fp8-param-gather", "--fp4-param-gather", "--attention-output-gate",
            "--moe-latent-size 8", "--experimental-attention-variant gated_delta_net",
        )
    ),
    Row("flag of ours, misspelt", f"{MOCK} --prores-shedule linear", ("--prores-shedule",)),
    Row("flag of ours, abbreviated", f"{MOCK} --prores-warmup 9", ("--prores-warmup",)),
    Row("flag without its value", f"{MOCK} --prores-warmup-iters",
        ("--prores-warmup-iters", "expected one argument")),
    Row("restart without finetuning", f"{MOCK} --prores-restart",
        ("--prores-restart", "--finetune")),
    Row("override that takes no value", f"{MOCK} --prores-override-checkpoint yes", ("yes",)),
    Row("unknown depth of verification", f"{MOCK} --prores-verify-checkpoint never",
        ("--prores-verify-checkpoint", "hashes")),
    Row("weight decay flag with a value", f"{MOCK} --embedding-weight-decay 0.1", ("0.1",)),
    Row("kernels that add the residual themselves",
        f"{MOCK} --transformer-impl inference_optimized",
        ("--transformer-impl inference_optimized", "alpha")),
    Row("a layer spec of the user's", f"{MOCK} --spec a b", ("--spec", "--prores-schedule")),
    Row("finetuning", f"{MOCK} --sft", ("--sft", "pretrains")),
    Row("a YAML file for flags", f"{MOCK} --yaml-cfg {{w}}/text.jsonl", ("--yaml-cfg",)),
)  # fmt: skip

_DEVICE = (
    Row("no GPU and no --device cpu", f"{MOCK} --device cuda", ("no CUDA GPU", "--device cpu"),
        environment={"CUDA_VISIBLE_DEVICES": ""}),
    Row("unknown device", f"{MOCK} --device tpu", ("--device tpu", "cuda, cpu"), ranks=2),
    Row("context parallelism on the CPU", f"{MOCK} --context-parallel-size 2",
        ("--context-parallel-size", "--device cpu"), ranks=2),
    Row("latent attention on the CPU", f"{MOCK} --multi-latent-attention",
        ("--multi-latent-attention", "--device cpu")),
    Row("Transformer Engine on the CPU", f"{MOCK} --transformer-impl transformer_engine",
        ("--transformer-impl", "--device cpu")),
    Row("NCCL on the CPU", f"{MOCK} --distributed-backend nccl", ("nccl", "--device cpu")),
    Row("fp16 on the CPU", f"{MOCK} --fp16", ("--fp16", "--bf16")),
    Row("FP8 on the CPU", f"{MOCK} --fp8-format hybrid", ("--fp8", "--device cpu")),
    Row("CUDA graphs on the CPU", f"{MOCK} --cuda-graph-impl local", ("--cuda-graph-impl",)),
    Row("all-to-all on the CPU",
        f"{MOCK} --num-experts 2 --moe-token-dispatcher-type alltoall --disable-bias-linear "
        "--expert-model-parallel-size 2",
        ("--moe-token-dispatcher-type", "--device cpu")),
)  # fmt: skip

_DATA = (
    Row("no data at all", f"{CPU} {_NULL}", ("no data", "--data-path")),
    Row("data that is not there", f"{TEXT} --data-path /nowhere/text_document",
        ("--data-path /nowhere/text_document", ".bin")),
    Row("data with its ending", f"{TEXT} --data-path {{w}}/good.bin", ("--data-path", ".bin")),
    Row("data without its .idx", f"{TEXT} --data-path {{w}}/no_idx", ("no_idx.idx",)),
    Row("data without its .bin", f"{TEXT} --data-path {{w}}/no_bin", ("no_bin.bin",)),
    Row("truncated .bin", f"{TEXT} --data-path {{w}}/cut_bin",
        ("--data-path", "cut_bin.bin", "bytes", "cut_bin.idx"), ranks=2),
    Row("truncated .bin, one of several",
        f"{TEXT} --train-data-path 0.5 {{w}}/good 0.5 {{w}}/cut_bin --valid-data-path {{w}}/good",
        ("--train-data-path", "cut_bin.bin")),
    Row("empty .bin", f"{TEXT} --data-path {{w}}/empty_bin", ("--data-path", "empty_bin.bin")),
    Row("truncated .idx", f"{TEXT} --data-path {{w}}/cut_idx", ("--data-path", "cut_idx.idx")),
    Row("empty .idx", f"{TEXT} --data-path {{w}}/empty_idx", ("--data-path", "empty_idx.idx")),
    Row(".idx that is none", f"{TEXT} --data-path {{w}}/text_idx",
        ("--data-path", "text_idx.idx", "not an index")),
    Row(".idx that is empty of documents", f"{TEXT} --data-path {{w}}/no_documents",
        ("--data-path", "no_documents")),
    Row(".idx that points past the .bin", f"{TEXT} --data-path {{w}}/far",
        ("--data-path", "far.idx")),
    Row("list of data that is not there", f"{TEXT} --data-args-path /nowhere/list",
        ("--data-args-path /nowhere/list",)),
    Row("list of data per split that is not there",
        f"{TEXT} --per-split-data-args-path /nowhere/list",
        ("--per-split-data-args-path /nowhere/list",)),
    Row("list of data per split that is none",
        f"{TEXT} --per-split-data-args-path {{w}}/text.jsonl",
        ("--per-split-data-args-path", "JSON")),
    Row("weights without data", f"{TEXT} --data-path 0.5 0.5", ("--data-path",)),
    Row("weights for some of the data", f"{TEXT} --data-path 0.5 {{w}}/good {{w}}/good",
        ("--data-path 0.5", "no file 0.5.bin")),
    Row("weights mixed up", f"{TEXT} --data-path 0.5 {{w}}/good {{w}}/good {{w}}/good",
        ("--data-path 0.5", "no file 0.5.bin")),
    Row("mock data and real data", f"{MOCK} --data-path {{w}}/good", ("single data source",)),
    Row("data twice",
        f"{TEXT} --data-path {{w}}/good --train-data-path {{w}}/good", ("single data source",)),
    Row("split that is none", f"{TEXT} --data-path {{w}}/good --split all", ("--split all",)),
    Row("split of nothing", f"{TEXT} --data-path {{w}}/good --split 0,0,0", ("--split 0,0,0",)),
    Row("cache in a file", f"{TEXT} --data-path {{w}}/good --data-cache-path {{w}}/text.jsonl",
        ("--data-cache-path", "text.jsonl")),
)  # fmt: skip

_TOKENIZER = (
    Row("no tokenizer", f"{CPU} --data-path {{w}}/good", ("--tokenizer-type is missing",)),
    Row("unknown tokenizer", f"{CPU} --mock-data --tokenizer-type Mine", ("--tokenizer-type",)),
    Row("null tokenizer without its size", f"{CPU} --mock-data --tokenizer-type NullTokenizer",
        ("NullTokenizer", "--vocab-size")),
    Row("null tokenizer of negative size", f"{MOCK} --vocab-size -5", ("--vocab-size",)),
    Row("tokenizer without its model",
        f"{CPU} --data-path {{w}}/good --tokenizer-type SentencePieceTokenizer",
        ("SentencePieceTokenizer", "--tokenizer-model")),
    Row("tokenizer model that is not there",
        f"{TEXT} --data-path {{w}}/good --tokenizer-model /nowhere/pieces.model",
        ("--tokenizer-model /nowhere/pieces.model",)),
    Row("tokenizer model that is none",
        f"{TEXT} --data-path {{w}}/good --tokenizer-model {{w}}/text.jsonl",
        ("--tokenizer-model", "text.jsonl"), ranks=2),
    Row("empty tokenizer model",
        f"{TEXT} --data-path {{w}}/good --tokenizer-model {{w}}/empty.model",
        ("--tokenizer-model", "empty.model")),
    Row("tokenizer model that is a directory",
        f"{TEXT} --data-path {{w}}/good --tokenizer-model {{w}}",
        ("--tokenizer-model",)),
    Row("tokenizer smaller than the data's",
        f"{TEXT} --data-path {{w}}/good --tokenizer-model {{w}}/fewer.model",
        ("--data-path", "token id", "--tokenizer-model"), ranks=2),
    Row("null tokenizer smaller than the data's",
        f"{CPU} {_NULL} --train-data-path {{w}}/good --valid-data-path {{w}}/good",
        ("--train-data-path", "token id", "--vocab-size")),
    Row("negative token ids", f"{TEXT} --data-path {{w}}/negative",
        ("--data-path", "token id -1")),
)  # fmt: skip

_ENVIRONMENT = (
    Row("rank without world size", MOCK, ("WORLD_SIZE", "RANK"),
        environment={"RANK": "1", "WORLD_SIZE": ""}),
    Row("world size that is no number", MOCK, ("WORLD_SIZE", "two"),
        environment={"WORLD_SIZE": "two"}),
    Row("world size of nothing", MOCK, ("RANK=0", "WORLD_SIZE=0"),
        environment={"WORLD_SIZE": "0"}),
    Row("rank that is no number", MOCK, ("RANK", "first"), environment={"RANK": "first"}),
    Row("rank beyond the world", MOCK, ("RANK", "7"), environment={"RANK": "7"}),
    Row("local rank that is no number", MOCK, ("LOCAL_RANK", "x"),
        environment={"LOCAL_RANK": "x"}),
    Row("world size without an address", MOCK, ("MASTER_ADDR", "torchrun"),
        environment={"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": ""}),
    Row("port that is no number", MOCK, ("MASTER_PORT", "http"),
        environment={"MASTER_PORT": "http"}),
)  # fmt: skip

_LAYOUT = (
    Row("more tensor ranks than ranks", f"{MOCK} --tensor-model-parallel-size 2",
        ("Megatron refuses", "world size")),
    Row("world that does not fit the layout",
        f"{MOCK} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
        ("world size (2)", "total_model_size"), ranks=2),
    Row("tensor ranks of no number", f"{MOCK} --tensor-model-parallel-size 0",
        ("--tensor-model-parallel-size 0",)),
    Row("pipeline ranks of no number", f"{MOCK} --pipeline-model-parallel-size -1",
        ("--pipeline-model-parallel-size -1",)),
    Row("layers that do not divide", f"{MOCK} --num-layers 3 --pipeline-model-parallel-size 2",
        ("Number of layers", "pipeline-model-parallel"), ranks=2),
    Row("virtual stages that do not divide",
        f"{MOCK} --num-layers-per-virtual-pipeline-stage 3 --pipeline-model-parallel-size 2",
        ("virtual pipeline stage",), ranks=2),
    Row("virtual stages per rank that do not divide",
        f"{MOCK} --num-virtual-stages-per-pipeline-rank 3 --pipeline-model-parallel-size 2",
        ("virtual",), ranks=2),
    Row("virtual stages without a pipeline", f"{MOCK} --num-layers-per-virtual-pipeline-stage 2",
        ("pipeline-model-parallel size",)),
    Row("prediction layers beside a tied output head",
        f"{MOCK} --pipeline-model-parallel-size 2 --mtp-num-layers 1 "
        "--position-embedding-type rope --save {w}/new",
        ("--mtp-num-layers", "--untie-embeddings-and-output-weights"), ranks=2),
    Row("the same, in a layout",
        f"{MOCK} --pipeline-model-parallel-size 2 --mtp-num-layers 1 "
        "--position-embedding-type rope --pipeline-model-parallel-layout Ettt|tmL --save {w}/new",
        ("--mtp-num-layers", "--pipeline-model-parallel-layout"), ranks=2),
    Row("layout with layers missing",
        f"{MOCK} --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tL",
        ("layer",), ranks=2),
    Row("layout with prediction layers on the rank of the embedding",
        f"{MOCK} --pipeline-model-parallel-size 2 --mtp-num-layers 1 "
        "--position-embedding-type rope --pipeline-model-parallel-layout Ett|tt|m|L",
        ("Ett|tt|m|L", "rank 0"), ranks=2),
    Row("layout with a rank that has nothing",
        f"{MOCK} --pipeline-model-parallel-size 3 --pipeline-model-parallel-layout E||ttttL "
        "--save {{w}}/new",
        ("E||ttttL", "rank 1 has nothing"), ranks=3),
    Row("uneven stages that do not add up",
        f"{MOCK} --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 3 "
        "--decoder-last-pipeline-num-layers 2",
        ("-1 middle layers",), ranks=2),
    Row("heads that do not divide",
        f"{MOCK} --num-attention-heads 1 --tensor-model-parallel-size 2",
        ("num_attention_heads",), ranks=2),
    Row("feed-forward that does not divide",
        f"{MOCK} --ffn-hidden-size 127 --tensor-model-parallel-size 2",
        ("--ffn-hidden-size 127",), ranks=2),
    Row("query groups that do not divide",
        f"{MOCK} --group-query-attention --num-query-groups 3",
        ("--num-query-groups 3", "--num-attention-heads 4")),
    Row("query groups that tensor ranks cannot share",
        f"{MOCK} --hidden-size 66 --num-attention-heads 3 --group-query-attention "
        "--num-query-groups 1 --kv-channels 8 --tensor-model-parallel-size 3",
        ("--num-query-groups 1", "40 rows", "--tensor-model-parallel-size 3"), ranks=3),
    Row("sequence that does not divide",
        f"{MOCK} --seq-length 31 --tensor-model-parallel-size 2 --sequence-parallel",
        ("--seq-length 31", "--sequence-parallel"), ranks=2),
    Row("experts that do not divide",
        f"{MOCK} --disable-bias-linear --num-experts 3 --expert-model-parallel-size 2 "
        "--moe-token-dispatcher-type allgather",
        ("expert",), ranks=2),
    Row("expert ranks without experts", f"{MOCK} --expert-model-parallel-size 2",
        ("expert",), ranks=2),
    Row("more experts per token than experts",
        f"{MOCK} --disable-bias-linear --num-experts 2 --moe-router-topk 3 "
        "--moe-token-dispatcher-type allgather",
        ("--moe-router-topk 3",)),
    Row("sequence parallelism and norms of queries and keys on the CPU",
        f"{MOCK} --sequence-parallel --tensor-model-parallel-size 2 --qk-layernorm",
        ("--sequence-parallel", "--qk-layernorm"), ranks=2),
    Row("sequence parallelism without ProRes on the CPU",
        f"{MOCK} --sequence-parallel --tensor-model-parallel-size 2 --prores-schedule none",
        ("--sequence-parallel", "--prores-schedule none"), ranks=2),
)  # fmt: skip

_MODEL = (
    Row("no layers", f"{MOCK} --num-layers 0", ("--num-layers 0",)),
    Row("negative layers", f"{MOCK} --num-layers -4", ("--num-layers -4",)),
    Row("layers not given", MOCK, ("num-layers",), without=("--num-layers",)),
    Row("hidden size not given", MOCK, ("hidden_size",), without=("--hidden-size",)),
    Row("hidden size of nothing", f"{MOCK} --hidden-size 0", ("--hidden-size 0",)),
    Row("hidden size that does not divide", f"{MOCK} --hidden-size 66", ("hidden_size",)),
    Row("sequence length not given", MOCK, ("seq_length",), without=("--seq-length",)),
    Row("sequence of nothing", f"{MOCK} --seq-length 0", ("--seq-length 0",)),
    Row("sequence longer than positions", f"{MOCK} --seq-length 64", ("max_position_embeddings",)),
    Row("unknown normalization", f"{MOCK} --normalization BatchNorm",
        ("--normalization", "BatchNorm")),
    Row("unknown positions", f"{MOCK} --position-embedding-type sinus",
        ("--position-embedding-type",)),
    Row("two activations", f"{MOCK} --swiglu --squared-relu", ("swiglu",)),
    Row("dropout above 1", f"{MOCK} --hidden-dropout 1.5", ("--hidden-dropout 1.5",)),
    Row("negative dropout", f"{MOCK} --attention-dropout -0.1", ("--attention-dropout -0.1",)),
    Row("number that is none", f"{MOCK} --hidden-size big", ("--hidden-size", "big")),
    Row("recomputation without a method", f"{MOCK} --recompute-granularity full",
        ("recompute_method",)),
    Row("recomputation of nothing known",
        f"{MOCK} --recompute-granularity selective --recompute-modules everything",
        ("everything",)),
)  # fmt: skip

_TRAINING = (
    Row("iterations not given", MOCK, ("--train-iters", "--train-samples"),
        without=("--train-iters",)),
    Row("no iterations", f"{MOCK} --train-iters 0", ("--train-iters 0",)),
    Row("negative iterations", f"{MOCK} --train-iters -2", ("--train-iters -2",)),
    Row("iterations and samples", f"{MOCK} --train-samples 8", ("iteration-based",)),
    Row("learning rate not given", MOCK, ("--lr",), without=("--lr",)),
    Row("learning rate below the least", f"{MOCK} --min-lr 1",
        ("Megatron refuses", "min_lr <= lr")),
    Row("negative learning rate", f"{MOCK} --lr=-1e-3", ("--lr -0.001", "negative")),
    Row("warmup longer than the decay",
        f"{MOCK} --lr-warmup-iters 5", ("--lr-warmup-iters 5",)),
    Row("two learning rate warmups", f"{MOCK} --lr-warmup-iters 1 --lr-warmup-fraction 0.1",
        ("lr-warmup-fraction",)),
    Row("WSD without its decay", f"{MOCK} --lr-decay-style WSD",
        ("--lr-decay-style WSD", "--lr-wsd-decay-iters")),
    Row("unknown decay", f"{MOCK} --lr-decay-style stairs", ("--lr-decay-style",)),
    Row("micro batch not given", MOCK, ("micro_batch_size",), without=("--micro-batch-size",)),
    Row("micro batch of nothing", f"{MOCK} --micro-batch-size 0", ("--micro-batch-size 0",)),
    Row("batch that does not divide",
        f"{MOCK} --micro-batch-size 2 --global-batch-size 6 --eval-global-batch-size 8",
        ("global batch size (6)", "micro batch size (2)"), ranks=2),
    Row("batch that does not divide, in evaluation too",
        f"{MOCK} --micro-batch-size 2 --global-batch-size 3", ("batch_size (3)",)),
    Row("both half precisions", f"{MOCK} --bf16 --fp16", ("fp16",)),
    Row("fp32 residuals without half precision", f"{MOCK} --fp32-residual-connection",
        ("residual connection",)),
    Row("evaluation interval not given", MOCK, ("--eval-interval is missing",),
        without=("--eval-interval",)),
    Row("evaluation interval of nothing", f"{MOCK} --eval-interval 0", ("--eval-interval 0",)),
    Row("log interval of nothing", f"{MOCK} --log-interval 0", ("--log-interval 0",)),
    Row("layer norms every 0 iterations",
        f"{MOCK} --tensorboard-dir {{w}}/t --log-layer-norms-interval 0",
        ("--log-layer-norms-interval 0", "at least 1")),
    Row("layer norms that nobody writes", f"{MOCK} --log-layer-norms-interval 2",
        ("--log-layer-norms-interval needs --tensorboard-dir",)),
    Row("layer norms of a replayed graph",
        f"{MOCK} --tensorboard-dir {{w}}/t --log-layer-norms-interval 2 --cuda-graph-impl local",
        ("--cuda-graph-impl", "--log-layer-norms-interval")),
    Row("spikes logged with a value", f"{MOCK} --log-spikes yes", ("yes",)),
    Row("steps skipped above the mean itself", f"{MOCK} --skip-step-above-sigmas 0",
        ("--skip-step-above-sigmas 0.0", "above 0")),
    Row("steps skipped above no number", f"{MOCK} --skip-step-above-sigmas nan",
        ("--skip-step-above-sigmas nan", "above 0")),
    Row("unknown optimizer", f"{MOCK} --optimizer lion", ("--optimizer",)),
    Row("parameters gathered late, not sharded", f"{MOCK} --overlap-param-gather",
        ("overlap-param-gather",)),
    Row("a flag that is no more, which upstream ends with exit code 0",
        f"{MOCK} --checkpoint-activations", ("--checkpoint-activations",)),
    Row("a word too many", f"{MOCK} surplus", ("surplus",)),
    Row("recomputing an MLP with biases, which upstream never ends",
        f"{MOCK} --recompute-granularity selective --recompute-modules mlp",
        ("--recompute-modules mlp", "--disable-bias-linear")),
)  # fmt: skip

_CHECKPOINT = (
    Row("save interval not given", f"{MOCK} --save saved", ("--save-interval",),
        without=("--save-interval",)),
    Row("save interval of nothing", f"{MOCK} --save saved --save-interval 0", ("--save-interval",)),
    Row("save into a file", f"{MOCK} --save {{w}}/text.jsonl", ("--save", "text.jsonl")),
    Row("save below a file", f"{MOCK} --save {{w}}/text.jsonl/saved", ("--save", "text.jsonl"),
        ranks=2),
    Row("save where nothing can be written", f"{MOCK} --save /proc/saved", ("--save /proc/saved",)),
    Row("TensorBoard into a file", f"{MOCK} --tensorboard-dir {{w}}/text.jsonl",
        ("--tensorboard-dir", "text.jsonl"), ranks=2),
    Row("W&B without a name for the run", f"{MOCK} --save saved --wandb-project p",
        ("--wandb-exp-name",), ranks=2),
    Row("W&B without a directory", f"{MOCK} --wandb-project p --wandb-exp-name e",
        ("--wandb-save-dir", "--save")),
    Row("no checkpoint, and one is wanted",
        f"{MOCK} --load {{w}}/folder.csv --exit-on-missing-checkpoint",
        ("--load", "--exit-on-missing-checkpoint"), ranks=2),
    Row("no directory of checkpoints, and one is wanted",
        f"{MOCK} --load /nowhere/saved --exit-on-missing-checkpoint",
        ("--load /nowhere/saved", "--exit-on-missing-checkpoint")),
    Row("no checkpoint to finetune", f"{MOCK} --load /nowhere/saved --finetune --prores-restart",
        ("--load /nowhere/saved", "--finetune")),
    Row("load a file", f"{MOCK} --load {{w}}/text.jsonl", ("--load", "text.jsonl")),
    Row("iteration that was not saved", f"{SAVED} --ckpt-step 7", ("saved", "iter_0000007")),
    Row("tracker of another iteration", f"{MOCK} --load {{w}}/astray", ("--load", "astray")),
    Row("tracker that is none", f"{MOCK} --load {{w}}/babble", ("--load", "babble")),
    Row("checkpoint with its common part cut", f"{MOCK} --load {{w}}/cut_saved",
        ("--load", "cut_saved"), ranks=2),
    Row("checkpoint of other layers", f"{SAVED} --num-layers 2 --prores-warmup-iters 4000",
        ("--num-layers 4 there, 2 here",), ranks=2),
    Row("checkpoint of other layers, overridden",
        f"{SAVED} --num-layers 2 --prores-override-checkpoint", ("--num-layers", "4", "2")),
    Row("checkpoint of another hidden size", f"{SAVED} --hidden-size 32",
        ("saved", "--hidden-size 64 there, 32 here"), ranks=2),
    Row("checkpoint of other heads", f"{SAVED} --num-attention-heads 2",
        ("--num-attention-heads 4 there, 2 here",)),
    Row("checkpoint of another feed-forward", f"{SAVED} --ffn-hidden-size 128",
        ("--ffn-hidden-size 256 there, 128 here",)),
    Row("checkpoint of another vocabulary", f"{SAVED} --vocab-size 500",
        ("saved", "vocabulary")),
    Row("checkpoint with tied embeddings", f"{SAVED} --untie-embeddings-and-output-weights",
        ("--untie-embeddings-and-output-weights",)),
    Row("checkpoint without gates", f"{SAVED} --swiglu --ffn-hidden-size 256", ("--swiglu",)),
    Row("checkpoint of another norm", f"{SAVED} --normalization RMSNorm", ("--normalization",)),
    Row("checkpoint with other positions", f"{SAVED} --position-embedding-type rope",
        ("--position-embedding-type",)),
    Row("checkpoint of more positions", f"{SAVED} --max-position-embeddings 64",
        ("--max-position-embeddings 32 there, 64 here",)),
    Row("checkpoint with biases", f"{SAVED} --disable-bias-linear", ("--disable-bias-linear",)),
    Row("checkpoint without experts",
        f"{SAVED} --disable-bias-linear --num-experts 2 --moe-token-dispatcher-type allgather",
        ("--num-experts",)),
    Row("checkpoint of another warmup", f"{SAVED} --prores-warmup-iters 9",
        ("--prores-warmup-iters", "there, 9 here"), ranks=2),
    Row("checkpoint of another placement", f"{SAVED} --norm-placement sandwich",
        ("--norm-placement pre there, sandwich here",)),
    Row("finetuning without a word on the warmup", f"{SAVED} --finetune",
        ("--finetune", "--prores-restart")),
)  # fmt: skip

# Flags of Megatron's that docs/flags.md refuses.
_FLAGS = tuple(
    Row(f"flag: {argv}", f"{MOCK} {argv}", words)
    for argv, words in (
        ("--inprocess-restart", ("--inprocess-restart", "launcher")),
        ("--adlr-autoresume", ("--adlr-autoresume", "userlib")),
        ("--use-rope-scaling --rope-scaling-factor 4", ("--rope-scaling-factor", "8")),
        ("--position-embedding-type relative", ("--position-embedding-type relative",)),
        ("--position-embedding-type mrope --mrope-section 2 2 4",
         ("--position-embedding-type mrope", "text")),
        ("--num-query-groups 2", ("--num-query-groups", "--group-query-attention")),
        ("--tokenizer-type NullMultimodalTokenizer", ("--tokenizer-type", "text")),
        ("--logits-load-dir logits", ("--logits-load-dir", "distillation")),
        ("--logits-save-dir logits --logits-save-top-k 8", ("--logits-save-dir",)),
        ("--batch-size 2", ("--batch-size", "--micro-batch-size")),
        ("--warmup 2", ("--warmup", "--lr-warmup-fraction")),
        ("--model-parallel-size 2", ("--model-parallel-size", "--tensor-model-parallel-size")),
        ("--enable-cuda-graph", ("--enable-cuda-graph", "--cuda-graph-impl local")),
        ("--external-cuda-graph", ("--external-cuda-graph", "--cuda-graph-impl")),
        ("--cuda-graph-scope attn", ("--cuda-graph-scope", "--cuda-graph-modules")),
        ("--cuda-graph-modules full_iteration", ("--cuda-graph-impl full_iteration",)),
        ("--init-method-xavier-uniform", ("--init-method-xavier-uniform", "cannot build")),
        ("--full-validation", ("--full-validation", "--multiple-validation-sets")),
        ("--multiple-validation-sets", ("--multiple-validation-sets", "--full-validation")),
        ("--decoder-num-layers 4", ("--decoder-num-layers", "--num-layers")),
        ("--decoder-seq-length 32", ("--decoder-seq-length", "--seq-length")),
        ("--vision-pretraining", ("--vision-pretraining", "text")),
        ("--ckpt-convert-format torch", ("--ckpt-convert-format",)),
        ("--hybrid-override-pattern M*-*", ("--hybrid-override-pattern", "hybrid")),
        ("--mtp-hybrid-override-pattern M --mtp-num-layers 1",
         ("--mtp-hybrid-override-pattern", "hybrid")),
        ("--is-hybrid-model", ("--is-hybrid-model", "hybrid")),
        ("--dataloader-type external", ("--dataloader-type external",)),
        ("--object-storage-cache-path cache", ("--object-storage-cache-path",)),
        ("--num-experts 2 --moe-use-upcycling", ("--moe-use-upcycling", "dense")),
        ("--tensor-parallel-num-weight-shards 2", ("--tensor-parallel-num-weight-shards",)),
        ("--expert-tensor-parallel-num-weight-shards 2",
         ("--expert-tensor-parallel-num-weight-shards",)),
        ("--phase-transition-iterations 1", ("--phase-transition-iterations", "phase")),
        ("--freeze-all-layers", ("--freeze-all-layers", "--skip-train")),
        ("--no-initialization", ("--no-initialization", "--load")),
        ("--use-mup", ("--use-mup", "--embedding-init-method-std")),
        ("--lazy-mpu-init", ("--lazy-mpu-init",)),
        ("--fake-process-group", ("--fake-process-group",)),
        ("--use-ring-exchange-p2p", ("--use-ring-exchange-p2p", "torch")),
        ("--heterogeneous-layers-config-encoded-json {{}}",
         ("--heterogeneous-layers-config-encoded-json", "--heterogeneous-layers-config-path")),
        ("--fused-residual-rmsnorm --prores-schedule none --norm-placement sandwich",
         ("--fused-residual-rmsnorm", "--norm-placement sandwich")),
        ("--spec a b --prores-schedule none --norm-placement post",
         ("--spec", "--norm-placement post")),
        ("--apply-layernorm-1p", ("--apply-layernorm-1p", "--device cpu")),
        ("--experimental-attention-variant dsa",
         ("--experimental-attention-variant", "--transformer-impl local")),
        ("--num-experts 2 --moe-latent-size 8 --moe-token-dispatcher-type allgather "
         "--disable-bias-linear", ("--moe-latent-size", "--transformer-impl local")),
        ("--num-experts 2 --moe-token-dispatcher-type allgather",
         ("--num-experts with biases", "--disable-bias-linear")),
        ("--num-experts 2 --moe-token-dispatcher-type allgather --tensor-model-parallel-size 2",
         ("--tensor-model-parallel-size with --num-experts", "--sequence-parallel")),
        ("--reset-attention-mask --no-create-attention-mask-in-dataloader",
         ("--reset-attention-mask", "--no-create-attention-mask-in-dataloader")),
        ("--reset-attention-mask --transformer-impl transformer_engine",
         ("--reset-attention-mask", "--transformer-impl local")),
        ("--reset-attention-mask --pipeline-model-parallel-size 4",
         ("--reset-attention-mask", "--pipeline-model-parallel-size 4")),
        ("--reset-attention-mask --pipeline-model-parallel-size 2 "
         "--num-virtual-stages-per-pipeline-rank 2",
         ("--reset-attention-mask", "virtual pipeline stages")),
        ("--bf16 --fp32-residual-connection", ("--fp32-residual-connection", "--device cpu")),
        ("--log-memory-to-tensorboard", ("--log-memory-to-tensorboard", "--device cpu")),
        ("--te-precision-config-file /nowhere/recipe.yaml", ("/nowhere/recipe.yaml",)),
    )
)  # fmt: skip

_PREPROCESS = tuple(
    Row(f"preprocess: {name}", argv, words, PREPROCESS)
    for name, argv, words in (
        ("no input", f"--output-prefix out {_NULL}", ("--input",)),
        ("unknown flag", f"{TOKENIZE} --shuffle", ("--shuffle",)),
        ("input not there", f"{TOKENIZE} --input no.jsonl", ("--input no.jsonl: no such file",)),
        ("input a directory", f"{TOKENIZE} --input {{w}}", ("--input", "is a folder")),
        ("input empty", f"{TOKENIZE} --input {{w}}/empty.model", ("no document", "'text'")),
        ("input not JSON", f"{TOKENIZE} --input {{w}}/alpha.csv", ("alpha.csv:1: not JSON",)),
        ("input binary", f"{TOKENIZE} --input {{w}}/good.bin", ("good.bin:1: ",)),
        ("key not there", f"{TOKENIZE} --json-keys body", ("no key 'body'", "'text'")),
        ("key with a slash", f"{TOKENIZE} --json-keys a/b", ("--json-keys a/b",)),
        ("no workers", f"{TOKENIZE} --workers 0", ("--workers 0",)),
        ("no tokens", f"{TOKENIZE} --stop-after-tokens 0", ("--stop-after-tokens 0",)),
        ("vocabulary too small", f"{TOKENIZE} --vocab-size 3", ("token id", "--vocab-size")),
        ("tokenizer unknown", f"{TOKENIZE} --tokenizer-type Mine", ("--tokenizer-type", "Mine")),
        ("tokenizer model garbage",
         f"{TOKENIZE} --tokenizer-type SentencePieceTokenizer --tokenizer-model {{w}}/alpha.csv",
         ("SentencePieceTokenizer", "alpha.csv")),
        ("output there already", f"{TOKENIZE} --output-prefix {{w}}/there",
         ("there_text_document.bin already exists", "--overwrite")),
        ("output below a file", f"{TOKENIZE} --output-prefix {{w}}/text.jsonl/out",
         ("cannot write in", "text.jsonl")),
    )
)  # fmt: skip

_TRAIN_TOKENIZER = tuple(
    Row(f"train tokenizer: {name}", argv, words, "tools/train_tokenizer.py")
    for name, argv, words in (
        ("no output", "--input {w}/text.jsonl --vocab-size 300", ("--output",)),
        ("input not there", "--input no.jsonl --vocab-size 300 --output t.model",
         ("--input no.jsonl: no such file",)),
        ("input not JSON", "--input {w}/alpha.csv --vocab-size 300 --output t.model",
         ("alpha.csv:1: not JSON",)),
        ("vocabulary of nothing", "--input {w}/text.jsonl --vocab-size 0 --output t.model",
         ("--vocab-size 0",)),
        ("vocabulary too small", "--input {w}/text.jsonl --vocab-size 9 --output t.model",
         ("--vocab-size 9 is too small",)),
        ("vocabulary too large", "--input {w}/text.jsonl --vocab-size 90000 --output t.model",
         ("--vocab-size 90000 is too large",)),
        ("output there already",
         "--input {w}/text.jsonl --vocab-size 300 --output {w}/pieces.model",
         ("pieces.model already exists", "--overwrite")),
    )
)  # fmt: skip

_OTHER_TOOLS = (
    Row("build corpus: no output", "", ("--output-dir",), "tools/build_corpus.py"),
    Row("build corpus: fraction above 1", "--output-dir corpus --validation-fraction 2",
        ("--validation-fraction 2",), "tools/build_corpus.py"),
    Row("build corpus: most below least", "--output-dir corpus --min-megabytes 9 --max-megabytes 1",
        ("--max-megabytes 1", "--min-megabytes 9"), "tools/build_corpus.py"),
    Row("build corpus: output below a file",
        "--output-dir {w}/text.jsonl/corpus --min-megabytes 0.1 --max-megabytes 0.2",
        ("cannot write", "text.jsonl"), "tools/build_corpus.py"),
    Row("plot run: no logs there", "--tensorboard-dir no --output run.png",
        ("--tensorboard-dir no", "no such folder"), "tools/plot_run.py"),
    Row("plot run: no logs in it", "--tensorboard-dir {w}/folder.csv --output run.png",
        ("no TensorBoard event files",), "tools/plot_run.py"),
    Row("plot run: output no picture", "--tensorboard-dir {w} --output run.gif",
        ("--output run.gif", ".png"), "tools/plot_run.py"),
    Row("compare runs: no run there", "no other=no",
        ("no: no such directory",), "tools/compare_runs.py"),
    Row("compare runs: no logs in it", "a={w}", ("no TensorBoard event files", "--tensorboard-dir"),
        "tools/compare_runs.py"),
    Row("compare runs: output no picture", "{w} --output runs.gif",
        ("--output runs.gif", ".png"), "tools/compare_runs.py"),
    Row("compare runs: a directory for the numbers", "{w} --json {w}/folder.csv",
        ("--json", "folder.csv", "directory"), "tools/compare_runs.py"),
    Row("compare runs: all weight on the past", "{w} --ema 1", ("--ema 1", "below 1"),
        "tools/compare_runs.py"),
    Row("export: no checkpoint there", "--load no --output model",
        ("--load no", "no such directory"), "tools/export_hf.py"),
    Row("export: model with an MLP without a gate", "--load {w}/saved --output model",
        ("no --swiglu", "cannot be exported"), "tools/export_hf.py"),
    Row("export: no such iteration", "--load {w}/saved --ckpt-step 77 --output model",
        ("--ckpt-step 77",), "tools/export_hf.py"),
    Row("import: no model there", "--model no --save imported",
        ("--model no", "config.json"), "tools/import_hf.py"),
    Row("generate: no checkpoint there", "--load no --prompt a",
        ("--load no", "no such directory"), "tools/generate.py"),
    Row("generate: no temperature", "--load {w}/saved --prompt a --temperature 0",
        ("--temperature 0", "--greedy"), "tools/generate.py"),
    Row("cosine: no text there", "--load {w}/saved --other-step 1 --text no",
        ("--text no", "cannot be read"), "tools/layer_cosine.py"),
    Row("cosine: no tokens", "--load {w}/saved --other-step 1 --text {w}/text.jsonl --tokens 0",
        ("--tokens 0", "at least 1"), "tools/layer_cosine.py"),
    Row("cosine: no picture",
        "--load {w}/saved --other-step 1 --text {w}/text.jsonl --output model.json",
        ("--output model.json", ".png"), "tools/layer_cosine.py"),
    Row("cosine: no other checkpoint", "--load {w}/saved --other-step 77 --text {w}/text.jsonl",
        ("--other-step 77",), "tools/layer_cosine.py"),
    Row("evaluate: no steps between", "--load {w}/saved --tasks piqa --every 0",
        ("--every 0", "at least 1"), "tools/evaluate.py"),
    Row("hub: no command", "", ("command",), "tools/hub.py"),
    Row("hub: file not there", "text --dataset json --data-files {w}/no.jsonl",
        ("--dataset json", "no.jsonl"), "tools/hub.py"),
    Row("hub: no text in it", "text --dataset csv --data-files {w}/alpha.csv",
        ("--dataset csv", "no column 'text'"), "tools/hub.py"),
    Row("checkpoint: no command", "", ("command",), CHECKPOINT),
    Row("checkpoint: unknown command", "repair {w}", ("repair", "verify"), CHECKPOINT),
    Row("checkpoint: nothing there", "list /nowhere/saved", ("/nowhere/saved",), CHECKPOINT),
    Row("checkpoint: none in it", "verify {w}/folder.csv", ("folder.csv",), CHECKPOINT),
    Row("checkpoint: a file", "list {w}/text.jsonl", ("text.jsonl",), CHECKPOINT),
    Row("checkpoint: one to compare", "diff {w}", ("B",), CHECKPOINT),
    Row("doctor: unknown need", "--need gpu,speed", ("--need speed", "network"), DOCTOR),
    Row("doctor: no need", "--need ,", ("--need", "empty", "cpu"), DOCTOR),
    Row("doctor: unknown flag", "--fix", ("--fix",), DOCTOR),
    Row("doctor: checkpoints into a file", "--save {w}/text.jsonl", ("--save", "text.jsonl"),
        DOCTOR),
    # The others are in tests/unit/test_benchmark.py.
    Row("benchmark: no GPU", "--device cuda", ("no CUDA GPU", "--device cpu"), BENCHMARK,
        environment={"CUDA_VISIBLE_DEVICES": ""}),
    Row("benchmark: unknown case", "--cases 130M-bf16,13B-bf16",
        ("--cases 13B-bf16", "1.3B-bf16"), BENCHMARK),
    Row("benchmark: output that is a file", "--output {w}/text.jsonl", ("--output", "text.jsonl"),
        BENCHMARK),
)  # fmt: skip

_PLAN = tuple(
    Row(f"plan: {name}", argv, words, "tools/plan.py")
    for name, argv, words in (
        ("no world size", f"-- {MOCK}", ("--world-size is missing",)),
        ("world size of nothing", f"--world-size 0 -- {MOCK}", ("--world-size 0",)),
        ("world size that is no number", f"--world-size many -- {MOCK}", ("--world-size", "many")),
        ("nothing to plan", "--world-size 8", ("behind --", "pretrain_gpt_prores.py")),
        ("nothing behind the dashes", "--world-size 8 --", ("behind -- there is nothing",)),
        ("flags before the dashes", f"--world-size 8 --num-layers 4 -- {MOCK}", ("--num-layers",)),
        ("nodes without GPUs", f"--world-size 8 --gpus-per-node 0 -- {MOCK}",
         ("--gpus-per-node 0",)),
        ("time that is none", f"--world-size 8 --time-limit soon -- {MOCK}",
         ("--time-limit soon", "D-HH:MM:SS")),
        ("steps of no time", f"--world-size 8 --seconds-per-step 0 -- {MOCK}",
         ("--seconds-per-step 0",)),
        ("picture of another kind", f"--world-size 8 --picture plan.jpg -- {MOCK}",
         ("--picture plan.jpg", ".png")),
        ("picture into nowhere", f"--world-size 8 --picture /nowhere/plan.png -- {MOCK}",
         ("--picture /nowhere/plan.png", "/nowhere")),
        ("JSON with a value", f"--world-size 8 --json yes -- {MOCK}", ("yes",)),
        ("a flag of the program, misspelt", f"--world-size 8 -- {MOCK} --prores-shedule linear",
         ("--prores-shedule",)),
        ("a flag that the program refuses", f"--world-size 8 -- {MOCK} --inprocess-restart",
         ("--inprocess-restart", "launcher")),
        ("layers that do not divide",
         f"--world-size 8 --json -- {MOCK} --pipeline-model-parallel-size 8",
         ("Number of layers", "pipeline-model-parallel")),
    )
)  # fmt: skip

ROWS = (
    *_PRORES, *_DEVICE, *_DATA, *_TOKENIZER, *_ENVIRONMENT, *_LAYOUT, *_MODEL, *_TRAINING,
    *_CHECKPOINT, *_FLAGS, *_PREPROCESS, *_TRAIN_TOKENIZER, *_OTHER_TOOLS, *_PLAN,
)  # fmt: skip

FROM_OUTSIDE = (
    # Of our flags, the environment and the device, before Megatron is imported.
    *("unknown schedule", "world size that is no number", "no GPU and no --device cpu"),
    # Before Megatron's validation, and by it.
    *("data that is not there", "more tensor ranks than ranks"),
    # The same stages on several ranks; and what comes between validation and the first writing.
    *("negative warmup", "truncated .bin", "layers that do not divide"),
    *("layout with a rank that has nothing", "tokenizer smaller than the data's"),
    *("save below a file", "checkpoint with its common part cut"),
    *("checkpoint of another hidden size", "checkpoint of another warmup"),
    # Each tool once; the benchmark asks for a GPU, which a CPU plays elsewhere.
    *("preprocess: no input", "train tokenizer: input not there", "build corpus: no output"),
    *("plot run: no logs there", "compare runs: no run there"),
    *("benchmark: no GPU", "export: no checkpoint there"),
    *("import: no model there", "generate: no temperature", "evaluate: no steps between"),
    *("cosine: no text there", "hub: no command"),
    *("checkpoint: nothing there", "doctor: unknown need", "plan: no world size"),
)  # fmt: skip
"""Names of rows that are started as whole programs."""
