"""Exports are the models that Megatron saved: the same logits, in the real classes of transformers.

One launch of ranks per layout saves all models, and computes their logits as it goes.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_prores.config.placement import PLACEMENTS
from megatron_prores.convert import export as exporting
from megatron_prores.convert import stored_weights
from megatron_prores.convert.export import export, open_checkpoint
from tests.distributed.conftest import MODEL, Text
from tests.distributed.export_ranks import Model, save_models
from tests.distributed.launch import run_ranks

VOCABULARY = 250  # Megatron pads it to 256

TOKENS = torch.randint(0, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(1)).tolist()

# Weights large enough for every branch to matter, so that a fault in one shows.
BASE = (
    *MODEL,
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY)),
    *("--train-iters", "12", "--save-interval", "4", "--no-save-optim", "--no-save-rng"),
    *("--no-load-optim", "--init-method-std", "0.15"),
)
LINEAR = ("--prores-schedule", "linear", "--prores-warmup-iters", "8")
TP2_PP2 = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")

STEPS = {"linear": (0, 4, 8), "none": (8,)}
"""Of a warmup of 8 iterations: its start, its middle, its end."""


def without(*flags: str) -> tuple[str, ...]:
    return tuple(word for word in BASE if word not in flags)


def placements(layout: tuple[str, ...]) -> list[Model]:
    return [
        Model(
            f"{placement}-{schedule}",
            (*BASE, "--norm-placement", placement, *layout, *flags),
            STEPS[schedule],
        )
        for placement in PLACEMENTS
        for schedule, flags in (("linear", LINEAR), ("none", ("--prores-schedule", "none")))
    ]


VARIANTS = [
    Model("grouped", (*BASE, *LINEAR, "--group-query-attention", "--num-query-groups", "2"), (4,)),
    Model("tied", (*without("--untie-embeddings-and-output-weights"), *LINEAR), (4,)),
    Model("rope", (*BASE, *LINEAR, "--rotary-base", "500000", "--use-rope-scaling"), (4,)),
    Model("long", (*BASE, *LINEAR, "--rotary-seq-len-interpolation-factor", "2"), (4,)),
    Model("layernorm", (*without("--normalization", "RMSNorm"), *LINEAR), (4,)),
    Model(
        "layernorm-sandwich",
        (*without("--normalization", "RMSNorm"), *LINEAR, "--norm-placement", "sandwich"),
        (4,),
    ),
    Model("biases", (*without("--disable-bias-linear"), *LINEAR), (4,)),
    Model(
        "biases-post",
        (*without("--disable-bias-linear"), *LINEAR, "--norm-placement", "post"),
        (4,),
    ),
    Model("qkv-biases", (*BASE, *LINEAR, "--add-qkv-bias"), (4,)),
    Model("qk-norms", (*BASE, *LINEAR, "--qk-layernorm"), (4,)),
    Model("wide-heads", (*BASE, *LINEAR, "--kv-channels", "32"), (4,)),
    Model(
        "experts",
        (
            *(*BASE, *LINEAR, "--num-experts", "4", "--moe-ffn-hidden-size", "96"),
            *("--moe-router-topk", "2", "--moe-token-dispatcher-type", "allgather"),
        ),
        (4,),
    ),
]
CLASSES = {
    **dict.fromkeys(("pre", "lns", "grouped", "tied", "rope", "long"), "LlamaForCausalLM"),
    **dict.fromkeys(("biases", "qkv-biases", "wide-heads"), "LlamaForCausalLM"),
    **dict.fromkeys(("post", "deepnorm", "layernorm", "layernorm-sandwich"), "ProResForCausalLM"),
    **{"sandwich": "Glm4ForCausalLM", "biases-post": "ProResForCausalLM"},
    **{"qk-norms": "Qwen3ForCausalLM", "experts": "MixtralForCausalLM"},
}


@dataclass(frozen=True)
class Saved:
    """Models that were saved by one launch."""

    directory: Path

    def logits(
        self, name: str, step: int, vocabulary: int | None = VOCABULARY
    ) -> NDArray[np.float32]:
        whole: NDArray[np.float32] = np.load(self.directory / name / f"logits{step}.npy")
        return whole[..., :vocabulary]

    def export(self, name: str, step: int, output: Path, **options: Any) -> str:
        source = open_checkpoint(self.directory / name, step)
        return export(source, output, options.pop("dtype", "fp32"), **options).name


def save(
    directory: Path, models: list[Model], ranks: int, tokens: list[list[int]] = TOKENS
) -> Saved:
    arguments = (models, str(directory), tokens)
    job = run_ranks(directory / "job", save_models, arguments, ranks, timeout=600.0)
    assert job.succeeded, job.output[-3000:]
    return Saved(directory)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(tmp_path_factory.mktemp("one"), [*placements(()), *VARIANTS], 1)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(tmp_path_factory.mktemp("four"), placements(TP2_PP2), 4)


def logits_of(directory: Path, tokens: list[list[int]] = TOKENS) -> NDArray[np.float32]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype="auto")
    with torch.no_grad():
        logits: NDArray[np.float32] = model.eval()(torch.tensor(tokens)).logits.float().numpy()
    return logits


def difference(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# A sum in another order is the whole difference between the two programs.
TOLERANCE = 1e-5

CASES = [
    (f"{placement}-{schedule}", step)
    for placement in PLACEMENTS
    for schedule, steps in STEPS.items()
    for step in steps
]


@pytest.mark.parametrize(("name", "step"), CASES, ids=[f"{name} at {step}" for name, step in CASES])
@pytest.mark.parametrize("layout", ["one_rank", "four_ranks"])
def test_the_export_has_megatrons_logits(
    layout: str, name: str, step: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    saved: Saved = request.getfixturevalue(layout)
    kind = saved.export(name, step, tmp_path / "hf")
    assert kind == CLASSES[name.split("-")[0]]
    assert difference(logits_of(tmp_path / "hf"), saved.logits(name, step)) <= TOLERANCE


@pytest.mark.parametrize("model", VARIANTS, ids=lambda model: model.name)
def test_variants_of_the_model_have_megatrons_logits(
    model: Model, one_rank: Saved, tmp_path: Path
) -> None:
    assert one_rank.export(model.name, 4, tmp_path / "hf") == CLASSES[model.name]
    assert difference(logits_of(tmp_path / "hf"), one_rank.logits(model.name, 4)) <= TOLERANCE


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_our_own_class_serves_every_placement(
    placement: str, one_rank: Saved, tmp_path: Path
) -> None:
    name = f"{placement}-linear"
    assert one_rank.export(name, 4, tmp_path / "hf", own_class=True) == "ProResForCausalLM"
    assert (tmp_path / "hf" / "modeling_prores.py").is_file()
    assert difference(logits_of(tmp_path / "hf"), one_rank.logits(name, 4)) <= TOLERANCE


def test_the_layout_leaves_no_trace_in_an_export(
    one_rank: Saved, four_ranks: Saved, tmp_path: Path
) -> None:
    """The two launches draw other weights; the files have the same names, shapes and dtypes."""
    from safetensors import safe_open

    shapes = []
    for number, saved in enumerate((one_rank, four_ranks)):
        saved.export("pre-linear", 8, tmp_path / str(number), dtype="bf16")
        with safe_open(tmp_path / str(number) / "model.safetensors", "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes.append({k: (s.get_shape(), s.get_dtype()) for k, s in slices.items()})
    assert shapes[0] == shapes[1]
    assert shapes[0]["model.embed_tokens.weight"] == ([VOCABULARY, 64], "BF16")


def _rope_as_it_is(weight: torch.Tensor, channels: int) -> torch.Tensor:
    return weight.clone()


def _halves_exchanged(self: Any, name: str, leading: tuple[int, ...], half: int) -> torch.Tensor:
    whole: torch.Tensor = self._read(name, leading)
    return whole.chunk(2)[1 - half].clone()


def _one_layer_forgotten(*args: Any, **kwargs: Any) -> tuple[float, ...]:
    alphas = list(_stock_alphas(*args, **kwargs))
    alphas[2] = 1.0
    return tuple(alphas)


_stock_alphas = exporting._alphas


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "fault"),
    [
        ("sandwich-linear", stored_weights, "interleave_rope", _rope_as_it_is),
        ("pre-linear", stored_weights._Stored, "_half", _halves_exchanged),
        ("pre-linear", exporting, "_alphas", _one_layer_forgotten),
        ("sandwich-linear", exporting, "_alphas", _one_layer_forgotten),
        ("deepnorm-linear", exporting, "_alphas", _one_layer_forgotten),
    ],
    ids=["rope", "gate and up", "alpha, pre", "alpha, sandwich", "alpha, deepnorm"],
)
def test_a_planted_fault_is_seen(
    name: str,
    owner: Any,
    attribute: str,
    fault: Any,
    one_rank: Saved,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, attribute, fault)
    one_rank.export(name, 4, tmp_path / "hf")
    assert difference(logits_of(tmp_path / "hf"), one_rank.logits(name, 4)) > 1e-3


def import_back(model: str, save: str) -> None:
    """Runs in a rank of its own: importing prepares the CPU device for the life of a process."""
    from megatron_prores.convert.from_hugging_face import main

    main(["--model", model, "--save", save, "--dtype", "fp32"])


IMPORTED = [f"{placement}-linear" for placement in PLACEMENTS]


def import_all(directory: str) -> None:
    """Imports every export below a directory, one process each: Megatron's state is global."""
    import os

    for name in IMPORTED:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                import_back(f"{directory}/{name}", f"{directory}/{name}-back")
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, name


@pytest.fixture(scope="module")
def imported(one_rank: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every placement after its warmup, exported and imported back."""
    root = tmp_path_factory.mktemp("imported")
    for name in IMPORTED:
        one_rank.export(name, 8, root / name)
    job = run_ranks(root / "job", import_all, (str(root),), timeout=600.0)
    assert job.succeeded, job.output[-3000:]
    return root


@pytest.mark.parametrize("name", IMPORTED)
def test_export_and_import_back_are_equal_bit_for_bit(
    name: str, imported: Path, one_rank: Saved
) -> None:
    before = open_checkpoint(one_rank.directory / name, 8).stored
    after = open_checkpoint(imported / f"{name}-back").stored
    for key in after.tensors:
        there, here = before.tensor(key), after.tensor(key)
        rows = VOCABULARY if key.startswith(("embedding", "output_layer")) else None
        assert torch.equal(there[:rows], here[:rows]), key
    assert set(after.tensors) == {k for k in before.tensors if not k.startswith("optimizer")}


def test_an_import_is_loaded_at_any_layout(imported: Path, four_ranks: Saved) -> None:
    """The logits after loading the imported model on TP2 x PP2 are those of its export."""
    directory = imported / "loaded"
    model = Model(
        "again",
        (*BASE, *TP2_PP2, "--norm-placement", "sandwich", "--prores-schedule", "none"),
        (0,),
        load=str(imported / "sandwich-linear-back"),
    )
    again = save(directory, [model], 4)
    expected = logits_of(imported / "sandwich-linear")
    assert difference(again.logits("again", 0), expected) <= TOLERANCE


def test_the_model_card_says_where_alpha_stood(one_rank: Saved, tmp_path: Path) -> None:
    one_rank.export("post-linear", 4, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| `--prores-schedule` | linear |" in card
    assert "| iteration | 4 |" in card
    assert f"| tokens seen | {4 * 8 * 64} |" in card
    # alpha of layer l of 4 after 4 of 8 iterations is min(4 / (2 l), 1).
    assert "2 of 4 layers had an alpha below 1 (the smallest 0.5)" in card
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["prores"]["alphas"] == [1.0, 1.0, 4 / 6, 0.5]


@dataclass(frozen=True)
class Read:
    """Models in fp32 and in bf16 that read the beginning of a validation text.

    The text stands behind the token that ends the document before it, and without that one.
    """

    saved: Saved
    ids: list[int]
    """Of the text, behind the token that ends the document before it."""
    text: str
    end_of_document: int
    tokenizer: str


@pytest.fixture(scope="module")
def read(text: Text, tmp_path_factory: pytest.TempPathFactory) -> Read:
    import sentencepiece

    model = Path(text.flags[text.flags.index("--tokenizer-model") + 1])
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    document = json.loads((model.parent / "valid.jsonl").read_text().splitlines()[0])["text"]
    ids = tokenizer.encode(document)[:63]
    flags = list(BASE)
    at = flags.index("--tokenizer-type")
    del flags[at : at + 4]
    flags.remove("--mock-data")
    words = (*flags, *text.flags, *LINEAR)
    saved = save(
        tmp_path_factory.mktemp("read"),
        [
            Model("fp32", (*words, "--norm-placement", "sandwich"), (4,)),
            *(
                Model(f"bf16-{placement}", (*words, "--bf16", "--norm-placement", placement), (4,))
                for placement in PLACEMENTS
            ),
        ],
        1,
        [[tokenizer.eos_id(), *ids], [*ids, tokenizer.eos_id()]],
    )
    return Read(saved, ids, tokenizer.decode(ids), tokenizer.eos_id(), str(model))


def test_the_tokenizer_comes_with_the_model(read: Read, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    read.saved.export("fp32", 4, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer(read.text)["input_ids"] == read.ids
    assert tokenizer.decode(read.ids) == read.text
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) == 512


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_in_bf16_both_models_say_the_same(placement: str, read: Read, tmp_path: Path) -> None:
    """The KL divergence on validation text, in nats per token, is printed."""
    read.saved.export(f"bf16-{placement}", 4, tmp_path / "hf", dtype="bf16")
    tokens = [[read.end_of_document, *read.ids]]
    ours = torch.tensor(logits_of(tmp_path / "hf", tokens)).log_softmax(-1)
    theirs = torch.tensor(read.saved.logits(f"bf16-{placement}", 4, None)[:1]).log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    print(f"KL(Megatron || export), bf16, {placement}: {divergence:.2e} nats per token")
    # Logits of a few units, kept to 8 bits: 0.02 of difference are a KL of 2e-4.
    assert divergence < 1e-3


def test_lm_eval_sees_megatrons_likelihoods(read: Read, tmp_path: Path) -> None:
    """Of a continuation, and of the whole text behind the end of another document."""
    from lm_eval.api.instance import Instance

    from megatron_prores.evaluation.harness import harness_model

    read.saved.export("fp32", 4, tmp_path / "hf")
    harness = harness_model(tmp_path / "hf", "cpu", 1)
    logits = torch.tensor(read.saved.logits("fp32", 4, None))[0].double().log_softmax(-1)
    per_token = logits[:-1].gather(1, torch.tensor(read.ids)[:, None])[:, 0]

    assert harness.tok_encode(read.text) == read.ids
    rolling = Instance("loglikelihood_rolling", {}, (read.text,), 0)
    assert harness.loglikelihood_rolling([rolling])[0] == pytest.approx(
        per_token.sum().item(), rel=1e-5
    )

    # Where the text can be cut without another division into tokens.
    import sentencepiece

    words = sentencepiece.SentencePieceProcessor(model_file=read.tokenizer)
    cut = next(
        n
        for n in range(20, len(read.ids))
        if words.encode(words.decode(read.ids[:n])) == read.ids[:n]
        and not words.decode(read.ids[:n])[-1].isspace()
    )
    context = words.decode(read.ids[:cut])
    request = Instance("loglikelihood", {}, (context, read.text.removeprefix(context)), 0)
    # Without the token that ends the document before: lm-eval adds it to an empty context alone.
    likely = torch.tensor(read.saved.logits("fp32", 4, None))[1].double().log_softmax(-1)
    following = torch.tensor(read.ids[cut:])
    expected = likely[cut - 1 : len(read.ids) - 1].gather(1, following[:, None]).sum().item()
    (found, is_greedy), *_ = harness.loglikelihood([request])
    assert found == pytest.approx(expected, rel=1e-5)
    assert not is_greedy


PERPLEXITY = """
task: text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
"""


def test_lm_eval_computes_megatrons_perplexity(read: Read, tmp_path: Path) -> None:
    from megatron_prores.evaluation.harness import Tasks, _parser, evaluate

    read.saved.export("fp32", 4, tmp_path / "hf")
    (tmp_path / "text.json").write_text(json.dumps({"text": read.text}))
    (tmp_path / "text.yaml").write_text(PERPLEXITY.format(data=tmp_path / "text.json"))
    flags = _parser().parse_args(["--load", ".", "--tasks", "text"])
    scores = evaluate(tmp_path / "hf", Tasks("text", tmp_path), ["text"], flags, "cpu")["text"]
    logits = torch.tensor(read.saved.logits("fp32", 4, None))[0].double().log_softmax(-1)
    loss = -logits[:-1].gather(1, torch.tensor(read.ids)[:, None]).sum().item()
    words, size = len(re.split(r"\s+", read.text)), len(read.text.encode())
    assert scores["word_perplexity,none"] == pytest.approx(math.exp(loss / words), rel=1e-4)
    assert scores["byte_perplexity,none"] == pytest.approx(math.exp(loss / size), rel=1e-5)


def test_a_checkpoint_writes_text(
    read: Read, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedily it goes on as Megatron's own logits say; the export is kept beside it."""
    from megatron_prores.evaluation.text import main

    root = read.saved.directory / "fp32"
    arguments = ["--load", str(root), "--dtype", "fp32", "--device", "cpu", "--greedy"]
    main([*arguments, "--prompt", "def ", "--prompt", "class ", "--max-new-tokens", "4"])
    shown = capsys.readouterr().out
    assert shown.startswith("def ")
    assert "\nclass " in shown
    kept = root / "hugging_face" / "iter_0000004-fp32"
    before = (kept / "model.safetensors").stat().st_mtime_ns
    main([*arguments, "--prompt", "", "--max-new-tokens", "1"])
    assert (kept / "model.safetensors").stat().st_mtime_ns == before
    first = int(read.saved.logits("fp32", 4, None)[0, 0].argmax())
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=read.tokenizer)
    assert capsys.readouterr().out.rstrip("\n") == model.decode([first]).rstrip("\n")
