"""What is the target machine's business: its GPUs, its packages, its files.

The planner runs where the run will not: on a laptop, on a login node. There the real program would
refuse a command line because Transformer Engine, the data or a directory is missing. In here such a
refusal becomes a note. What is there is checked as the program checks it, and every other refusal
is the program's own.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_prores import environment
from megatron_prores.errors import UserError
from megatron_prores.upstream.registry import replace, undone_afterwards

ASSUMED_TE = "2.20"
"""The Transformer Engine that pyproject.toml asks for, where Megatron asks which one there is."""

ASSUMED_CAPABILITY = (9, 0)
"""CUDA compute capability of the GPUs: Hopper."""

PAPER_VOCABULARY = 32000

_VOCABULARIES = {"GPT2BPETokenizer": 50257, "TikTokenizer": 131072}
"""Of tokenizers that have one size, or Megatron's default."""


class Notes(list[str]):
    """What was not checked, or taken as given; each once."""

    def add(self, note: str) -> None:
        """Add a note unless it is there."""
        if note not in self:
            self.append(note)


class _StandInTokenizer:
    """The size of a tokenizer that is not on this machine; nothing else of it is asked for."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eod = None


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Replace attributes for a while; an attribute that is not there is an error.

    Args:
        owner: A module or class.
        **values: The attributes' new values, by name.
    """
    with undone_afterwards():
        replace(owner, replaced, **values)
        yield


@contextmanager
def target_machine(notes: Notes) -> Iterator[None]:
    """Let the program's command line be parsed as on the machines of the run.

    Nothing is opened for writing meanwhile: no TensorBoard, no W&B.

    Args:
        notes: Takes what was not checked.
    """
    from megatron.training import global_vars

    silent = {
        name: lambda *args: None
        for name in (
            "_set_tensorboard_writer",
            "_set_wandb_writer",
            "_set_one_logger",
            "_set_adlr_autoresume",
            "_set_energy_monitor",
            "_set_signal_handler",
        )
    }
    with ExitStack() as stack:
        packages = stack.enter_context(environment.every_package())
        stack.enter_context(replaced(global_vars, **silent))
        stack.enter_context(_gpus())
        stack.enter_context(_Files(notes).seen_from_here())
        yield
        if packages:
            notes.add(
                f"packages that must be installed there, and are not here: {', '.join(packages)}"
            )


_PERMUTATIONS = (
    "fused_permute",
    "fused_permute_with_probs",
    "fused_sort_chunks_by_index",
    "fused_sort_chunks_by_index_with_probs",
    "fused_unpermute",
)


def _kernel(*args: Any) -> Any:
    raise NotImplementedError


@contextmanager
def _gpus() -> Iterator[None]:
    """Answer Megatron's questions about the GPU and Transformer Engine."""
    import torch
    from megatron.core import utils
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import moe_utils
    from packaging.version import Version

    major, minor = ASSUMED_CAPABILITY
    properties = SimpleNamespace(
        name="a GPU of the plan", major=major, minor=minor, total_memory=0, multi_processor_count=0
    )
    with (
        replaced(utils, _te_version=Version(ASSUMED_TE)),
        # Megatron asks whether these kernels were imported; none is called here.
        replaced(rope_utils, fused_apply_rotary_pos_emb=_kernel),
        replaced(moe_utils, **dict.fromkeys(_PERMUTATIONS, _kernel)),
        replaced(
            torch.cuda,
            get_device_capability=lambda *args: ASSUMED_CAPABILITY,
            get_device_properties=lambda *args: properties,
        ),
    ):
        yield


class _Files:
    """The checks of files, with those that are not on this machine left out and noted."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.tokenizer_is_here = True

    @contextmanager
    def seen_from_here(self) -> Iterator[None]:
        """Put the methods below in the place of the program's checks."""
        from megatron.training import global_vars

        from megatron_prores.checkpoint import guard
        from megatron_prores.command_line import paths, setup_checks

        self.check_output_here = paths._check_writable
        self.check_save_here = guard._check_writable
        self.check_paths_here = guard.check_paths
        self.check_checkpoint_here = paths.check_checkpoint_is_there
        self.check_tokenizer_here = paths.check_tokenizer_arguments
        self.check_dataset_here = paths.check_dataset
        self.check_token_ids_here = setup_checks.check_token_ids
        self.build_tokenizer_here = global_vars.build_tokenizer
        with (
            replaced(setup_checks, check_token_ids=self.check_token_ids),
            replaced(guard, _check_writable=self.check_save, check_paths=self.check_paths),
            replaced(
                paths,
                _check_writable=self.check_output,
                check_checkpoint_is_there=self.check_checkpoint,
                check_tokenizer_arguments=self.check_tokenizer,
                check_dataset=self.check_dataset,
            ),
            replaced(global_vars, build_tokenizer=self.build_tokenizer),
        ):
            yield

    def check_output(self, flag: str, path: str) -> None:
        with self._unless(f"{flag} {path}: cannot be made here; not tried", [path]):
            self.check_output_here(flag, path)

    def check_save(self, path: Path) -> None:
        with self._unless(f"--save {path}: cannot be made here; not tried", [str(path)]):
            self.check_save_here(path)

    def check_paths(self, args: Any) -> None:
        with self._unless(*self._checkpoints(args)):
            self.check_paths_here(args)

    def check_checkpoint(self, args: Any) -> None:
        with self._unless(*self._checkpoints(args)):
            self.check_checkpoint_here(args)

    def check_tokenizer(self, args: Any) -> None:
        # With some file in the place of those that are not here: the flags are checked alike.
        present = copy.copy(args)
        for destination in self._absent_of_tokenizer(args):
            setattr(present, destination, __file__)
        self.check_tokenizer_here(present)

    def check_dataset(self, flag: str, prefix: str) -> None:
        if _dataset_is_here(prefix):
            self.check_dataset_here(flag, prefix)
        else:
            self.notes.add(f"{flag} {prefix}: not here; the data was not looked at")

    def check_token_ids(
        self, datasets: Iterable[tuple[str, str]], vocabulary: int, named: str
    ) -> None:
        here = [(flag, prefix) for flag, prefix in datasets if _dataset_is_here(prefix)]
        if here and self.tokenizer_is_here:
            self.check_token_ids_here(here, vocabulary, named)

    def build_tokenizer(self, args: Any, **kwargs: Any) -> Any:
        absent = self._absent_of_tokenizer(args)
        needs = {"HuggingFaceTokenizer": "transformers", "GPT2BPETokenizer": "transformers"}
        package = needs.get(args.tokenizer_type)
        if not absent and (package is None or importlib.util.find_spec(package) is not None):
            return self.build_tokenizer_here(args, **kwargs)
        self.tokenizer_is_here = False
        return self._stand_in(args, absent)

    def _stand_in(self, args: Any, absent: list[str]) -> _StandInTokenizer:
        """Return a tokenizer of the size that the flags name, or of the likeliest one."""
        from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding

        size = args.vocab_size or _VOCABULARIES.get(args.tokenizer_type, PAPER_VOCABULARY)
        what = ", ".join(str(getattr(args, name)) for name in absent) or args.tokenizer_type
        if args.padded_vocab_size is not None:
            words = f"--padded-vocab-size {args.padded_vocab_size}"
            size = args.padded_vocab_size
        elif args.vocab_size:
            words = f"--vocab-size {size}"
        else:
            words = f"{size} ids, an assumption: --vocab-size would tell"
        self.notes.add(f"tokenizer {what}: not here; the vocabulary is that of {words}")
        if args.padded_vocab_size is None:
            args.padded_vocab_size = vocab_size_with_padding(size, args, logging_enabled=False)
        return _StandInTokenizer(size)

    def _absent_of_tokenizer(self, args: Any) -> list[str]:
        """Name the destinations of the flags whose files are not here."""
        named = ("tokenizer_model", "vocab_file", "merge_file", "metadata_path")
        return [name for name in named if (path := getattr(args, name)) and _is_absent(path)]

    def _checkpoints(self, args: Any) -> tuple[str, list[str]]:
        paths = [path for path in (args.load, args.pretrained_checkpoint) if path]
        return f"{', '.join(paths)}: not here; no checkpoint was looked at", paths

    @contextmanager
    def _unless(self, note: str, paths: list[str]) -> Iterator[None]:
        """Let a refusal pass as a note where one of the paths is not on this machine."""
        try:
            yield
        except UserError:
            if not any(_is_absent(path) for path in paths):
                raise
            self.notes.add(note)


def _is_absent(path: str) -> bool:
    """Return whether a path is not here, and could be elsewhere: nothing lies below a file."""
    if "://" in path or os.path.lexists(path):
        return False
    return next(place for place in Path(path).absolute().parents if place.exists()).is_dir()


def _dataset_is_here(prefix: str) -> bool:
    """Return whether there is anything to object to: half a dataset, or another kind of path.

    A number is no path: it is a weight that has come too far.
    """
    paths = (prefix, f"{prefix}.bin", f"{prefix}.idx")
    is_number = prefix.replace(".", "", 1).isdigit()
    return is_number or any(os.path.lexists(path) for path in paths)
