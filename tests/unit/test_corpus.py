import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prores.data import corpus
from megatron_prores.errors import UserError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "build_corpus.py"


def run_tool(cwd: Path, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", str(TOOL), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


def assert_one_line_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    for word in words:
        assert word in result.stderr


def read_documents(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library with everything that must be left out."""
    root = tmp_path / "library"
    (root / "site-packages" / "other").mkdir(parents=True)
    (root / "package" / "__pycache__").mkdir(parents=True)
    for number in range(60):
        (root / "package" / f"m{number:02}.py").write_text(f"def f():\r\n\treturn '▁{number}'\n")
    (root / "a_copy.py").write_bytes((root / "package" / "m07.py").read_bytes())
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "empty.py").write_text("")
    (root / "picture.png").write_bytes(b"text after all")
    (root / "site-packages" / "other" / "x.py").write_text("installed = True\n")
    (root / "package" / "__pycache__" / "x.py").write_text("cached = True\n")
    return root


def test_a_corpus_of_ten_megabytes_comes_from_this_python_alone_and_twice_the_same(
    tmp_path: Path,
) -> None:
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    for name in ("one", "two"):
        assert run_tool(elsewhere, "--output-dir", tmp_path / name).returncode == 0
    for name in ("train.jsonl", "valid.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    train, valid = (read_documents(tmp_path / "one" / n) for n in ("train.jsonl", "valid.jsonl"))
    assert sum(len(document["text"].encode()) for document in train + valid) >= 10_000_000
    assert 0.005 < len(valid) / len(train + valid) < 0.05
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "train.jsonl",
        "valid.jsonl",
    ]
    assert not list(elsewhere.iterdir())


def test_documents_are_whole_files_without_duplicates_undecodable_or_installed_ones(
    library: Path,
) -> None:
    found = corpus.collect(min_bytes=1, standard_library=library)
    # The copy sorts first and stays; the equal file after it is the repeat.
    expected = {f"package/m{n:02}.py" for n in range(60)} - {"package/m07.py"} | {"a_copy.py"}
    assert list(found) == sorted(expected)
    for source, text in found.items():
        assert text.encode() == (library / source).read_bytes()


def test_a_files_split_depends_on_its_path_alone(library: Path, tmp_path: Path) -> None:
    files = corpus.collect(1, library)
    later = dict(list(files.items())[20:])
    corpus.write_corpus(files, tmp_path / "all", 0.3)
    corpus.write_corpus(later, tmp_path / "some", 0.3)
    valid = {d["source"] for d in read_documents(tmp_path / "all" / "valid.jsonl")}
    train = {d["source"] for d in read_documents(tmp_path / "all" / "train.jsonl")}
    some = {d["source"] for d in read_documents(tmp_path / "some" / "valid.jsonl")}
    assert not valid & train
    assert valid | train == set(files)
    assert some == valid & set(later)


def test_a_cap_keeps_a_fixed_sample_from_all_over_the_library(library: Path) -> None:
    files = corpus.collect(1, library)
    limit = corpus.size_of(files) // 3
    kept = corpus.cap(files, limit)
    assert kept == corpus.cap(files, limit)
    assert 0.8 * limit < corpus.size_of(kept) <= limit
    positions = [list(files).index(source) for source in kept]
    assert positions == sorted(positions)
    assert positions[-1] > 2 * len(files) // 3


def test_a_library_without_its_tests_is_filled_up_with_installed_packages(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "big.py").write_text("# text\n" * 1000)
    assert "site-packages/big.py" in corpus.collect(5000, library, [packages])
    assert "installed packages" in capsys.readouterr().out
    with pytest.raises(UserError, match="--min-megabytes"):
        corpus.collect(50_000, library, [packages])


def test_another_corpus_in_the_folder_is_not_overwritten(library: Path, tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="already exists"):
        corpus.write_corpus(corpus.collect(1, library), tmp_path, 0.3)
    assert (tmp_path / "valid.jsonl").read_text() == "mine\n"
    assert not (tmp_path / "train.jsonl").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--validation-fraction", "1.5"], ["--validation-fraction", "1.5"]),
        (["--max-megabytes", "2"], ["--max-megabytes 2", "--min-megabytes 10"]),
        (["--output-dir", "taken/below"], ["taken"]),
    ],
)
def test_a_wrong_input_ends_with_one_line(
    tmp_path: Path, args: list[str], words: list[str]
) -> None:
    (tmp_path / "taken").write_text("a file where a folder is asked for")
    assert_one_line_error(run_tool(tmp_path, "--output-dir", "out", *args), *words)
    assert not (tmp_path / "out").exists()
