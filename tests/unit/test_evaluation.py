"""Scores by lm-evaluation-harness on local tasks, whose answers are checked by hand."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_prores.errors import UserError
from megatron_prores.evaluation.harness import Results, Tasks, _parser, evaluate, main, table

WORDS = ["</s>", "<unk>", "sky", "grass", "blood", "snow", "blue", "green", "red", "white"]
COLORS = {"sky": "blue", "grass": "green", "blood": "red", "snow": "white"}
CHOICES = list(COLORS.values())

MULTIPLE_CHOICE = """
task: colors
tag: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{thing}}}}"
doc_to_choice: {choices}
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

PERPLEXITY = """
task: last_word
tag: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{thing}}}}"
doc_to_target: " {{{{color}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def make_model(directory: Path, knows: bool) -> Path:
    """Saves a model of two words: what follows depends on the last word alone.

    Its branches are zero, so that the logits are head @ norm(embedding). Each word has a direction
    of its own; a model that knows has one row in its head for each pair of a thing and its color.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    size = len(WORDS)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=32,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, 16))
        model.lm_head.weight.zero_()
        for thing, color in COLORS.items() if knows else ():
            model.lm_head.weight[WORDS.index(color), WORDS.index(thing)] = 3.0
    model.save_pretrained(directory)
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    return directory


def write_tasks(root: Path) -> None:
    """Writes two tasks, and the data that they read."""
    root.mkdir(exist_ok=True)
    lines = [
        json.dumps({"thing": thing, "color": color, "answer": CHOICES.index(color)})
        for thing, color in COLORS.items()
    ]
    (root / "data.json").write_text("\n".join(lines))
    for name, content in (("colors", MULTIPLE_CHOICE), ("last_word", PERPLEXITY)):
        filled = content.format(data=root / "data.json", choices=json.dumps(CHOICES))
        (root / f"{name}.yaml").write_text(filled)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    root = tmp_path_factory.mktemp("tasks")
    write_tasks(root)
    found = Tasks("words", root)  # a tag
    assert sorted(found.names) == ["colors", "last_word"]
    found.manager._load_spec = None  # their data is not loaded again
    return found


def test_tasks_of_ones_own_do_not_wait_for_those_of_the_harness(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    found = Tasks("last_word,colors", tmp_path)
    assert found.names == ["last_word", "colors"]
    assert {"colors", "last_word"} <= set(found.manager.all_tasks)
    assert "arc_easy" not in found.manager.all_tasks


FLAGS = _parser().parse_args(["--load", ".", "--tasks", "colors"])


def test_a_model_that_knows_scores_1(tasks: Tasks, tmp_path: Path) -> None:
    scores = evaluate(make_model(tmp_path, knows=True), tasks, tasks.names, FLAGS, "cpu")
    assert scores["colors"]["acc,none"] == 1.0
    assert scores["last_word"]["acc,none"] == 1.0
    # The norm makes 4 of the one 1 among 16: the color's logit is 12, those of 9 other words are 0.
    expected = 1 + 9 * math.exp(-12)
    assert scores["last_word"]["perplexity,none"] == pytest.approx(expected, rel=1e-4)


def test_a_model_that_knows_nothing_scores_by_chance(tasks: Tasks, tmp_path: Path) -> None:
    scores = evaluate(make_model(tmp_path, knows=False), tasks, tasks.names, FLAGS, "cpu")
    # All four choices are as likely: it always takes the first, which is right once in four.
    assert scores["colors"]["acc,none"] == 0.25
    assert scores["last_word"]["perplexity,none"] == pytest.approx(len(WORDS), rel=1e-5)


def test_results_are_taken_up_again(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    results.add(10, {"colors": {"acc,none": 0.5}})
    results.add(20, {"colors": {"acc,none": 0.75}})
    again = Results(tmp_path / "results.json")
    assert again.of(10) == {"colors": {"acc,none": 0.5}}
    assert again.of(30) == {}
    (tmp_path / "results.json").write_text("no")
    with pytest.raises(UserError, match="cannot be read as results"):
        Results(tmp_path / "results.json")


def test_the_papers_figures_stand_beside_ours() -> None:
    source = Namespace(iteration=5, tokens=100, args=Namespace(norm_placement="pre"))
    scores = {f"task{n}": {"acc,none": 0.5, "acc_norm,none": 0.6} for n in range(10)}
    scores["wikitext"] = {"word_perplexity,none": 30.0}
    lines = table(scores, source).splitlines()  # type: ignore[arg-type]
    assert "60.00" in lines[1]
    assert any("25.61 without, 23.67 with ProRes" in line for line in lines)
    assert "60.00   the paper's 1.3B: 43.42 without, 45.00 with ProRes" in lines[-1]
    source.args.branch_init = "scaled"
    lines = table(scores, source).splitlines()  # type: ignore[arg-type]
    assert lines[-1].endswith("42.88 without, 44.98 with ProRes")
    assert not any("25.61" in line for line in lines)  # of pre with other weights, not printed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tasks nonsense", "--tasks nonsense: lm-evaluation-harness has no such task"),
        ("--tasks piqa --include-path nowhere", "--include-path nowhere: no such directory"),
        ("--tasks piqa --every 0", "--every 0: must be at least 1"),
        ("--tasks piqa --every 2 --ckpt-step 3", "--every and --ckpt-step: give one of them"),
        ("--tasks piqa --wandb-project p", "--wandb-project needs --wandb-exp-name"),
    ],
)
def test_wrong_input_ends_in_one_line(flags: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        main(["--load", str(tmp_path), "--device", "cpu", *flags.split()])
    assert words in error.value.message()


def test_a_task_without_its_data_says_how_to_bring_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "absent.yaml").write_text(
        MULTIPLE_CHOICE.format(data=tmp_path / "absent.json", choices="[]").replace(
            "task: colors", "task: absent"
        )
    )
    with pytest.raises(UserError) as error:
        Tasks("absent", tmp_path)
    assert "--tasks absent: its data cannot be loaded here" in error.value.message()
    assert "HF_HOME" in error.value.message()
