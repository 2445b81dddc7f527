"""Files that a run reads, changed at random: loaded as they were, or refused with words.

``--mutations 2000`` makes as many of each kind of file together; the suite makes 50.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prores.checkpoint import guard, manifest, newest, reader, tool
from megatron_prores.checkpoint.verify import content_damage, verify
from megatron_prores.data import dataset_files, megatron_tokenizer, tokenizer
from megatron_prores.errors import UserError
from megatron_prores.schedule.table import parse_table
from megatron_prores.training.save_lock import SaveLock
from megatron_prores.upstream import datasets
from tests.unit import stored
from tests.unit.preprocess_helpers import jsonl, random_texts, run
from tests.unit.test_fuzz import as_bytes

HOSTILE = [b"-1", b"0", b"9" * 5000, b"1e999", b"NaN", b"null", b'""', b"[]", b"../../etc/passwd"]
HOSTILE += [b"\0", b"\xff", b"\xed\xa0\x80", b"[" * 20_000]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change some bytes, in one of the ways in which disks, tools and people do."""
    at = rng.randrange(len(data) + 1)
    upto = min(len(data), at + rng.choice([1, 1, 4, 8, 100, len(data)]))
    return data[:at] + rng.choice(
        [
            bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :],
            rng.randbytes(upto - at) + data[upto:],
            bytes(upto - at) + data[upto:],
            data[upto:],
            b"",
            data[at:upto] + data[at:],
            rng.choice(HOSTILE) + data[upto:],
        ]
    )  # fmt: skip


@dataclass
class Mutated:
    """One file, changed, with what lies beside it."""

    root: Path
    path: Path
    same: bool
    """Whether the change changed nothing."""


Outcome = str
"""What came of it: one of GOOD, or what is wrong."""
GOOD = ("refused", "loaded")


def _refused(root: Path) -> bool:
    """Whether a run that is to load what is there refuses to; as it looks before it begins."""
    common = {"load": str(root), "pretrained_checkpoint": None, "save": None}
    try:
        guard.check_paths(Namespace(**common, ckpt_step=None))
    except UserError:
        return True
    return False


def _tools_survive(root: Path) -> None:
    for command in (["list", str(root)], ["verify", str(root)], ["diff", *2 * [str(root)]]):
        with contextlib.redirect_stdout(None), contextlib.suppress(UserError):
            tool.main(command)


def signed_checkpoint(file: Mutated) -> Outcome:
    """With a manifest, no change of any file of the checkpoint goes unseen."""
    _tools_survive(file.root)
    if not content_damage(file.path.parent):
        return "loaded" if file.same else "loaded what the manifest contradicts"
    return "refused"


def the_manifest(file: Mutated) -> Outcome:
    """A changed manifest contradicts the files, or says the same."""
    _tools_survive(file.root)
    return "refused" if content_damage(file.path.parent) else "loaded"


def unsigned_checkpoint(file: Mutated) -> Outcome:
    """Without a manifest, tensors are as they were or refused; the index has no checksum."""
    (file.path.parent / manifest.NAME).unlink()
    _tools_survive(file.root)
    if not verify(file.path.parent).intact:
        return "refused"
    if file.path.suffix == ".distcp":
        stored_now = reader.StoredCheckpoint(file.path.parent)
        if not torch.equal(stored_now.tensor("decoder.weight"), torch.arange(6.0).view(2, 3)):
            return "loaded other weights"
    return "loaded"


def the_tracker(file: Mutated) -> Outcome:
    """It leads to a checkpoint that is there, to none, or to words."""
    _tools_survive(file.root)
    if _refused(file.root):
        return "refused"
    choice = newest.to_load(file.root, None)
    return "loaded" if choice is None or choice.directory.is_dir() else f"loaded {choice}"


def the_lock(file: Mutated) -> Outcome:
    """A lock that cannot be read is somebody's for a while; then, or of a dead run, nobody's."""
    lock = SaveLock(file.root)
    try:
        lock.acquire()
    except UserError:
        return "refused"
    lock.release()
    return "loaded"


def a_dataset(file: Mutated) -> Outcome:
    """A dataset is refused, or all of it can be read."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = str(file.root / "out_text_document")
    try:
        dataset_files.check_dataset("--data-path", prefix)
        dataset_files.check_token_ids([("--data-path", prefix)], 257, "this one")
    except UserError:
        return "refused"
    dataset = IndexedDataset(prefix)
    for index in range(len(dataset)):
        assert dataset[index].size == dataset.sequence_lengths[index]
    return "loaded"


def a_dataset_index(file: Mutated) -> Outcome:
    """A cached index is refused, or is an array of numbers."""
    from megatron.core.datasets import gpt_dataset

    datasets.read_indices_as_numbers()
    try:
        array = gpt_dataset.safe_numpy_load(str(file.path), allow_pickle=True, mmap_mode="r")
    except UserError:
        return "refused"
    assert not array.dtype.hasobject
    array.sum() if array.dtype.kind in "iuf" else None
    return "loaded"


def a_table(file: Mutated) -> Outcome:
    """A schedule's table is refused, or within bounds."""
    try:
        steps, table = parse_table(file.path.read_bytes(), file.path.suffix)
    except ValueError:
        return "refused"
    assert ((table >= 0) & (table <= 1)).all()
    assert (np.diff(steps) > 0).all()
    return "loaded"


def a_tokenizer(file: Mutated) -> Outcome:
    """A SentencePiece model is refused, or makes ids of a text."""
    parser = ArgumentParser()
    megatron_tokenizer.add_tokenizer_arguments(parser)
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(file.path)]
    try:
        built: Any = megatron_tokenizer.build_megatron_tokenizer(parser.parse_args(flags))
    except UserError:
        return "refused"
    assert all(number >= 0 for number in built.tokenize("some text 123"))
    return "loaded"


def _make_checkpoints(root: Path) -> None:
    stored.make_two(root)


def _make_lock(root: Path) -> None:
    SaveLock(root)._take()


def _make_dataset(root: Path) -> None:
    (root / "in.jsonl").write_bytes(jsonl(random_texts(4)))
    run([root / "in.jsonl"], root / "out")


def _make_dataset_index(root: Path) -> None:
    np.save(root / "index.npy", np.arange(100, dtype=np.int64))


def _make_tables(root: Path) -> None:
    for ending in (".csv", ".json"):
        table = as_bytes([0, 10, 20], [[0.0, 0.0], [0.5, 0.25], [1.0, 1.0]], ending)
        (root / f"table{ending}").write_bytes(table)


@cache
def _model() -> bytes:
    text = Path(random.__file__).read_text()
    return tokenizer.train_model([text], 400)


def _make_tokenizer(root: Path) -> None:
    (root / "tokenizer.model").write_bytes(_model())


NEWEST = "iter_0000004"
KINDS: list[tuple[Callable[[Path], None], str, Callable[[Mutated], Outcome]]] = [
    (_make_checkpoints, f"{NEWEST}/*.distcp", signed_checkpoint),
    (_make_checkpoints, f"{NEWEST}/.metadata", signed_checkpoint),
    (_make_checkpoints, f"{NEWEST}/metadata.json", signed_checkpoint),
    (_make_checkpoints, f"{NEWEST}/{manifest.NAME}", the_manifest),
    (_make_checkpoints, f"{NEWEST}/*.distcp", unsigned_checkpoint),
    (_make_checkpoints, f"{NEWEST}/.metadata", unsigned_checkpoint),
    (_make_checkpoints, reader.TRACKER, the_tracker),
    (_make_lock, ".prores.lock", the_lock),
    (_make_dataset, "*.idx", a_dataset),
    (_make_dataset, "*.bin", a_dataset),
    (_make_dataset_index, "*.npy", a_dataset_index),
    (_make_tables, "table.*", a_table),
    (_make_tokenizer, "*.model", a_tokenizer),
]
"""How the files are made, which of them is changed, and what is then to hold."""


def _mutate_all(root: Path, numbers: range, results: Any) -> None:
    """Report (number, outcome) of each; in a process of its own, which a crash may end."""
    guard.safe_load.install()
    originals: dict[Callable[[Path], None], Path] = {}
    for number in numbers:
        make, pattern, check = KINDS[number % len(KINDS)]
        if make not in originals:
            originals[make] = root / make.__name__
            originals[make].mkdir()
            make(originals[make])
        rng = random.Random(number)
        place = root / "mutated"
        shutil.copytree(originals[make], place)
        path = rng.choice(sorted(place.glob(pattern)))
        before = path.read_bytes()
        path.write_bytes(after := mutate(before, rng))
        what = f"{check.__name__} {path.name}: "
        results.send((number, f"{what}it ended the process"))
        try:
            outcome = check(Mutated(place, path, before == after))
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        results.send((number, outcome if outcome in GOOD else what + outcome))
        shutil.rmtree(place)
    results.close()


def test_a_changed_file_is_refused_or_loaded_as_it_was(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    count = request.config.getoption("--mutations")
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=_mutate_all, args=(tmp_path, range(count), theirs)
    )
    child.start()
    theirs.close()
    outcomes: dict[int, Outcome] = {}
    while True:
        try:
            number, outcome = ours.recv()
        except EOFError:
            break
        outcomes[number] = outcome
    child.join()
    wrong = {n: what for n, what in outcomes.items() if what not in GOOD}
    assert not wrong, "\n".join(f"{number}: {what}" for number, what in wrong.items())
    assert len(outcomes) == count
    refused = sum(what == "refused" for what in outcomes.values())
    print(f"{count} changed files: {refused} refused, {count - refused} loaded")
    assert refused > count / 4
