"""What a start imports and reads: packages on demand or not at all, the help of flags once."""

from __future__ import annotations

import argparse
import inspect
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.config import TokenizerConfig

from megatron_prores.data import megatron_tokenizer
from megatron_prores.upstream import start_up
from megatron_prores.upstream.registry import undone_afterwards
from megatron_prores.upstream.start_up import hidden, import_on_demand, read_flag_help_once


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Gives the name of a package that can be imported, and that no test has imported yet."""
    name = f"made_up_{tmp_path.name}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("from . import inner\nvalue = 1\n")
    (tmp_path / name / "inner.py").write_text("value = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    for each in (name, f"{name}.inner"):
        monkeypatch.setitem(sys.modules, each, None)  # to be taken back afterwards
        del sys.modules[each]
    return name


def test_a_package_is_imported_when_something_of_it_is_asked_for(package: str) -> None:
    import_on_demand(package)
    module = __import__(package)
    inspect.getmodule(test_a_package_is_imported_when_something_of_it_is_asked_for)
    assert f"{package}.inner" not in sys.modules
    assert module.value == 1
    assert sys.modules[package] is module
    assert module.inner.value == 2
    with pytest.raises(AttributeError):
        _ = module.nothing


def test_a_module_of_a_package_brings_the_package(package: str) -> None:
    import_on_demand(package)
    assert __import__(f"{package}.inner").value == 1
    import_on_demand(package)  # it is there
    assert sys.modules[package].inner.value == 2


def test_a_package_that_is_not_installed_is_not_found(package: str) -> None:
    import_on_demand(f"{package}_2")
    with pytest.raises(ModuleNotFoundError):
        __import__(f"{package}_2")


def test_a_package_can_be_hidden(package: str) -> None:
    with hidden(package), pytest.raises(ModuleNotFoundError):
        __import__(package)
    assert __import__(package).value == 1
    with hidden(package):  # what is imported stays
        assert __import__(package).value == 1


@pytest.mark.parametrize(
    ("kind", "metadata", "found"),
    [
        ("SentencePieceTokenizer", None, False),
        ("NullTokenizer", None, False),
        ("NullTokenizer", "tokenizer.json", True),
        ("HuggingFaceTokenizer", None, True),
        ("GPT2BPETokenizer", None, True),
        ("SFTTokenizer", None, True),
    ],
)
def test_transformers_is_found_where_a_tokenizer_may_need_it(
    kind: str, metadata: str | None, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_ones: list[str] = []

    def note(name: str) -> AbstractContextManager[None]:
        hidden_ones.append(name)
        return nullcontext()

    monkeypatch.setattr(megatron_tokenizer, "hidden", note)
    args = argparse.Namespace(tokenizer_type=kind, metadata_path=metadata)
    megatron_tokenizer.import_tokenizers(args)
    assert hidden_ones == ([] if found else ["transformers"])


def test_the_help_of_flags_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[type] = []
    stock = ArgumentGroupFactory._get_field_docstrings

    def counted(self: ArgumentGroupFactory, src_cfg_class: type) -> dict[str, str]:
        read.append(src_cfg_class)
        return stock(self, src_cfg_class)

    monkeypatch.setattr(start_up, "_flag_help", {})
    monkeypatch.setattr(ArgumentGroupFactory, "_get_field_docstrings", counted)
    with undone_afterwards():
        read_flag_help_once()
        found = [ArgumentGroupFactory(TokenizerConfig).field_docstrings for _ in range(3)]
    assert len(read) == 1
    assert found[0]
    assert found[0] == found[2] == stock(ArgumentGroupFactory(TokenizerConfig), TokenizerConfig)
