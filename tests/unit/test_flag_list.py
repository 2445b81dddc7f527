"""docs/flags.md lists every flag of Megatron's parser, and what it says of each is so."""

from __future__ import annotations

import re
import shlex

import pytest

from megatron_prores.command_line.arguments import read_prores_flags
from megatron_prores.command_line.conflicts import check_flags
from megatron_prores.command_line.effects import NO_EFFECT, UNTRIED, effect_warnings
from megatron_prores.command_line.never import NEVER
from megatron_prores.command_line.rules import NEEDS_PACKAGE, NOT_WITH_OWN_LAYER
from megatron_prores.errors import UserError
from megatron_prores.system.environment import TargetEnvironment
from tests.distributed.launch import REPOSITORY
from tests.gpu.command_lines import BF16
from tests.unit.flag_list import (
    DOCUMENT,
    Listed,
    actions_by_flag,
    complaints,
    make_parser,
    read_document,
    words_of,
)

BASE = shlex.split(BF16)

REFUSED_WITH_A_VALUE = {
    *("--position-embedding-type", "--attention-backend", "--dataloader-type", "--tokenizer-type"),
    "--ckpt-format",
}
REFUSED_ALONE = {"--num-query-groups", "--full-validation", "--multiple-validation-sets"}
"""Flags that rules name and that are refused in part: their verdict in the document is another."""

PARSER = make_parser()
ACTIONS = actions_by_flag(PARSER)
LISTED = read_document()


class Machine(TargetEnvironment):
    """Has every package but one, and a GPU that is not asked."""

    has_this_gpu = False

    def __init__(self, missing: str = "") -> None:
        super().__init__()
        self.missing = missing

    def is_installed(self, module: str) -> bool:
        return module != self.missing


def of(verdict: str) -> list[Listed]:
    return [entry for entry in LISTED if entry.verdict == verdict]


def check(words: list[str], missing: str = "") -> None:
    """Parses and checks a command line as the main program does before Megatron validates it.

    Args:
        words: The command line.
        missing: A module that the machine does not have.
    """
    prores, _ = read_prores_flags(words)
    args = PARSER.parse_args(words)
    args.rank, args.world_size = 0, 1
    check_flags(args, prores, Machine(missing))


def flags_of(table: dict[str, str]) -> set[str]:
    destinations = {name for names in table.values() for name in names.split()}
    unknown = destinations - {action.dest for action in ACTIONS.values()}
    assert not unknown, f"no flag sets {unknown} any more"
    return {flag for flag, action in ACTIONS.items() if action.dest in destinations}


def test_the_document_has_every_flag_once() -> None:
    assert complaints(LISTED, set(ACTIONS)) == []


def test_each_group_of_the_parser_is_a_section() -> None:
    text = (REPOSITORY / DOCUMENT).read_text()
    for group in PARSER._action_groups:
        flags = [flag for action in group._group_actions for flag in action.option_strings]
        if flags := [flag for flag in flags if flag in ACTIONS]:
            _, _, section = text.partition(f"\n## {group.title}\n")
            assert {entry.flag for entry in read_document(section.split("\n## ")[0])} == set(flags)


def test_a_flag_that_upstream_adds_is_missed() -> None:
    parser = make_parser()
    parser.add_argument("--hyper-connections", action="store_true")
    (words,) = complaints(LISTED, set(actions_by_flag(parser)))
    assert words.startswith(f"--hyper-connections is not in {DOCUMENT}")
    assert "add a row" in words


def test_a_row_too_few_or_too_many_is_noticed() -> None:
    text = (REPOSITORY / DOCUMENT).read_text()
    without = read_document(re.sub(r"\n\| `--seed`.*", "", text))
    assert [words.split()[0] for words in complaints(without, set(ACTIONS))] == ["--seed"]
    more = [*LISTED, Listed("--seed", "planned", ""), Listed("--no-more", "vouched", "")]
    assert [words.split()[0] for words in complaints(more, set(ACTIONS))] == [
        "--no-more",
        "--seed",
        "--no-more",
    ]


@pytest.mark.parametrize("flag", [entry.flag for entry in of("refused")])
def test_a_refused_flag_ends_the_program_with_its_name(flag: str) -> None:
    check(BASE)
    with pytest.raises(UserError) as caught:
        check([*BASE, *words_of(flag, ACTIONS[flag])])
    assert flag in caught.value.message().split()
    assert "\n" not in caught.value.message()


LOCAL_LAYER_NORM = "--transformer-impl local --normalization LayerNorm"

NEEDS = {
    "emerging_optimizers": ("--optimizer muon", "--optimizer muon needs emerging-optimizers"),
    "transformer_engine": ("", "--transformer-impl transformer_engine .the default. needs"),
    "fla": ("--experimental-attention-variant gated_delta_net", "flash-linear-attention"),
    "mamba_ssm": ("--hybrid-layer-pattern M-M-", "--hybrid-layer-pattern M-M- needs mamba-ssm"),
    "apex": (f"{LOCAL_LAYER_NORM} --apply-layernorm-1p", "--apply-layernorm-1p .* needs Apex"),
    "fused_weight_gradient_mlp_cuda": ("", "give --no-gradient-accumulation-fusion"),
}


def test_every_package_is_in_the_table() -> None:
    assert NEEDS.keys() == {module for _, _, module, _, _ in NEEDS_PACKAGE}


@pytest.mark.parametrize("missing", NEEDS)
def test_a_flag_asks_the_target_machine_for_its_package(missing: str) -> None:
    flags, said = NEEDS[missing]
    words = [word for word in BASE if word != "--no-gradient-accumulation-fusion"] + flags.split()
    check(words)
    with pytest.raises(UserError, match="which is not installed") as caught:
        check(words, missing)
    assert re.search(said, caught.value.message())


def test_a_graph_of_transformer_engine_needs_it_whatever_the_layers() -> None:
    words = [*BASE, *shlex.split("--transformer-impl local --cuda-graph-impl transformer_engine")]
    check(words)
    with pytest.raises(UserError, match="--cuda-graph-impl transformer_engine needs"):
        check(words, "transformer_engine")


def test_what_the_rules_refuse_is_listed_as_refused() -> None:
    in_part = REFUSED_WITH_A_VALUE | REFUSED_ALONE
    named = {flag.split()[0] for flag, _, _ in (*NEVER, *NOT_WITH_OWN_LAYER)}
    named -= {"--transformer-impl", "--cuda-graph-modules", *in_part}
    assert named | {"--yaml-cfg"} == {entry.flag for entry in of("refused")}
    assert not in_part & {entry.flag for entry in of("refused")}


@pytest.mark.parametrize(
    ("verdict", "table", "words"),
    [
        ("no effect", NO_EFFECT, "has no effect in pretrain_gpt_prores.py: "),
        ("warned", UNTRIED, "is untried: "),
    ],
)
def test_a_warning_is_printed(verdict: str, table: dict[str, str], words: str) -> None:
    entries = of(verdict)
    assert {entry.flag for entry in entries} == flags_of(table)
    given = [[entry.flag, words_of(entry.flag, ACTIONS[entry.flag])] for entry in entries]
    for entry in entries:
        check([*BASE, *words_of(entry.flag, ACTIONS[entry.flag])])
    # One command line: building the parser takes longer than reading it. Of twins that say the
    # opposite, each has to be the last once.
    said = [
        *effect_warnings([word for _, each in given for word in each]),
        *effect_warnings([word for _, each in reversed(given) for word in each]),
    ]
    for entry in entries:
        lines = [line for line in said if line.startswith(f"{entry.flag} {words}")]
        says_default = entry.flag.startswith("--no-") and ACTIONS[entry.flag].default is False
        assert lines or says_default, entry.flag
        assert all(entry.why.replace("`", "") in line for line in lines), (lines, entry.why)


def test_defaults_and_other_flags_are_no_reason_for_a_warning() -> None:
    assert effect_warnings(BASE) == []
    assert effect_warnings([*BASE, "--img-h", "224", "--optimizer", "adam"]) == []
    assert effect_warnings(["--img-h=225"]) == [
        "--img-h has no effect in pretrain_gpt_prores.py: it belongs to vision models"
    ]


def test_a_run_flag_is_in_the_file_that_the_document_names() -> None:
    texts: dict[str, str] = {}
    for entry in of("run"):
        file = entry.why.split("`")[1]
        assert file.startswith(("tests/distributed/", "tests/kill_sweep", "examples/")), entry
        text = texts.setdefault(file, (REPOSITORY / file).read_text())
        spellings = ACTIONS[entry.flag].option_strings
        assert any(re.search(rf"(?<!\S){re.escape(each)}\b(?!-)", text.replace('"', " "))
                   for each in spellings), entry  # fmt: skip


@pytest.mark.parametrize("flag", [entry.flag for entry in of("planned")])
def test_a_planned_flag_is_taken(flag: str) -> None:
    check([*BASE, *words_of(flag, ACTIONS[flag])])
