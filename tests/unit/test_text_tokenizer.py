"""Preprocessing's tokenizers give the ids of Megatron's, text for text, and import no torch."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_prores.data import tokenizer, words
from megatron_prores.data.megatron_tokenizer import (
    add_tokenizer_arguments,
    build_megatron_tokenizer,
)
from megatron_prores.data.text_tokenizer import build_text_tokenizer
from megatron_prores.data.words import WordTokenizer
from tests.unit.preprocess_helpers import TOOL, jsonl
from tests.unit.test_tokenizer import AWKWARD, TEXTS

SCRIPTS = [
    "Съешь же ещё этих мягких французских булок, да выпей чаю. ",
    "ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Ὀλίγοι ἔμφρονες ",
    "視野無限廣，窗外有藍天。いろはにほへと ちりぬるを。키스의 고유조건은 ",
    "نص حكيم له سر قاطع وذو شأن عظيم ١٢٣ ‏ עטלף אבק נס דרך מזגן ",
    "ऋषियों को सताने वाले दुष्ट राक्षसों เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ",
    "Ąą çe ﬁn ½ ① ㎏ Å e\u0301 ñ\u0303 ẞ ǆ Ǆ İi ſ ™ ",
    "🎉👩\u200d👧🏽 𝔘𝔫𝔦 𓀀 \U000e0041 \u200b\u00ad\u2060 \ufffd \x00\x01\x7f\x85\xa0\u2028\u3000",
    "def f(x):\n\treturn  {'a': [1.5e-3, 0xFF]}  # ok!!\r\n\n\n   <s></s><unk> ▁▁a▁ b\t\t1,234.56",
]
TRAINED_ON = [*SCRIPTS, *(line for text in TEXTS for line in text[:6000].splitlines(True))]

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity",
              "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "default rules": {"byte_fallback": True},
    "no dummy prefix": {"byte_fallback": True, "add_dummy_prefix": False},
    "prefix behind": {"byte_fallback": True, "treat_whitespace_as_suffix": True},
    "across spaces": {"byte_fallback": True, "split_by_whitespace": False},
    "symbols": {"byte_fallback": True, "user_defined_symbols": ["<tab> ", "a b", "==", "→"]},
    "across scripts": {"byte_fallback": True, "split_by_unicode_script": False,
                       "split_by_number": False},
    "without bytes": {},
    "unigram": {"byte_fallback": True, "model_type": "unigram"},
}  # fmt: skip
"""Kinds of SentencePiece models that others have trained."""


def train(**given: Any) -> bytes:
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINED_ON), model_writer=content, minloglevel=2, num_threads=1,
        **{"vocab_size": 700, "model_type": "bpe", "character_coverage": 0.98,
           "max_sentence_length": 100_000, "hard_vocab_limit": False, **given},
    )  # fmt: skip
    return content.getvalue()


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    return {name: train(**given) for name, given in MODELS.items()} | {
        "this project's": tokenizer.train_model(TRAINED_ON, 700)
    }


@pytest.fixture(scope="module")
def pairs(models: dict[str, bytes]) -> dict[str, tuple[WordTokenizer, Any]]:
    return {
        name: (
            WordTokenizer(model, np.uint16),
            sentencepiece.SentencePieceProcessor(model_proto=model),
        )
        for name, model in models.items()
    }


def test_words_are_told_apart_where_that_is_sound(models: dict[str, bytes]) -> None:
    from sentencepiece import sentencepiece_model_pb2

    whole = set()
    for name, model in models.items():
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(model)
        if not words.word_pattern(proto):
            whole.add(name)
    assert whole == {"without bytes", "unigram", "prefix behind", "across spaces"}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([*AWKWARD, *SCRIPTS, *(s[i : i + 9] for s in SCRIPTS for i in (0, 7))]),
            st.text(max_size=12),
            st.text("ab 1.\n\t▁é日<>", max_size=12),
        ),
        max_size=6,
    )
)
def test_the_ids_are_those_of_sentencepiece(
    pairs: dict[str, tuple[WordTokenizer, Any]], parts: list[str]
) -> None:
    text = "".join(parts)
    for name, (ours, theirs) in pairs.items():
        expected = np.array(theirs.encode(text), np.uint16).tobytes()
        assert ours.encode(text) == expected, (name, text)


def test_a_text_is_encoded_alike_in_windows_of_any_size(
    pairs: dict[str, tuple[WordTokenizer, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join([*SCRIPTS, "x" * 300, *TRAINED_ON[8:60]])
    for size in (7, 64):
        monkeypatch.setattr(words, "_WINDOW", size)
        monkeypatch.setattr(words, "_MOST_WORDS", 50)
        for name, (ours, theirs) in pairs.items():
            expected = np.array(theirs.encode(text), np.uint16).tobytes()
            assert ours.encode(text) == expected, (name, size)


def byte_level_tokenizer(directory: Path, **config: Any) -> None:
    """Makes a byte-level tokenizer as Hugging Face keeps it."""
    directory.mkdir()
    (directory / "tokenizer.json").write_text(tokenizer.train_byte_level(TRAINED_ON, 700))
    eos = "<|endoftext|>"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def compare_with_megatrons(directory: str) -> None:
    """Compares all kinds, in a process of its own: for some, Megatron hides transformers."""
    parser = argparse.ArgumentParser()
    add_tokenizer_arguments(parser)
    for kind, name in (
        ("HuggingFaceTokenizer", "bytes"),
        ("HuggingFaceTokenizer", "gpt2"),
        ("SentencePieceTokenizer", "t.model"),
        ("Llama2Tokenizer", "t.model"),
    ):
        path = f"{directory}/{name}"
        args = parser.parse_args(["--tokenizer-type", kind, "--tokenizer-model", path])
        theirs, ours = build_megatron_tokenizer(args), build_text_tokenizer(args)
        assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod)
        for text in [*filter(None, AWKWARD), *TRAINED_ON]:
            expected = np.array(theirs.tokenize(text), np.uint16).tobytes()
            assert ours.encode(text) == expected, (kind, path, text)


def test_all_kinds_give_megatrons_ids(tmp_path: Path, models: dict[str, bytes]) -> None:
    (tmp_path / "t.model").write_bytes(models["llama"])
    byte_level_tokenizer(tmp_path / "bytes")
    # Of a class of its own: transformers alone knows what it does.
    byte_level_tokenizer(tmp_path / "gpt2", tokenizer_class="GPT2Tokenizer")
    script = f"import {__name__} as tests; tests.compare_with_megatrons({str(tmp_path)!r})"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=TOOL.parents[1], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_no_torch_is_imported(kind: str, models: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(models["llama"])
    byte_level_tokenizer(tmp_path / "bytes")
    (tmp_path / "in.jsonl").write_bytes(jsonl(["a text"]))
    path = {"S": "t.model", "H": "bytes"}[kind[0]]
    script = (
        "import sys; from megatron_prores.data.preprocess import main; main(sys.argv[1:]); "
        "print({'torch', 'megatron.core', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, "--input", tmp_path / "in.jsonl", "--output-prefix",
         tmp_path / "out", "--tokenizer-type", kind, "--tokenizer-model", tmp_path / path],
        cwd=TOOL.parents[1], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "set()"
