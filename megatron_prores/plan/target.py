"""The target environment of a plan: the machines of the run, seen from one where it will not run.

The planner runs on a laptop or a login node. There the real program would refuse a command line
because Transformer Engine, the data or a directory is missing. To the planner's checks that is a
note. What is there is checked as the program checks it, and every other refusal is the program's
own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_prores.data.megatron_tokenizer import TRANSFORMERS_TYPES
from megatron_prores.errors import UserError
from megatron_prores.system.environment import TargetEnvironment
from megatron_prores.upstream.registry import replace, undone_afterwards, wrap

TRANSFORMER_ENGINE = "2.20"
"""The version that pyproject.toml asks for, where Megatron asks which one there is."""

COMPUTE_CAPABILITY = (9, 0)
"""Of the GPUs: Hopper."""

_PAPER_VOCABULARY = 32000

_VOCABULARIES = {"GPT2BPETokenizer": 50257, "TikTokenizer": 131072}
"""Of tokenizers that have one size, or Megatron's default."""

_OPENED = ("tensorboard_writer", "wandb_writer", "one_logger", "signal_handler")
"""What Megatron opens or installs when it has parsed its flags."""

_PERMUTATIONS = """
    fused_permute fused_permute_with_probs fused_unpermute fused_sort_chunks_by_index
    fused_sort_chunks_by_index_with_probs
"""


class PlannedMachine(TargetEnvironment):
    """A machine with every package and Hopper GPUs, on which absent files may be."""

    has_this_gpu = False

    def __init__(self) -> None:
        super().__init__()
        self._packages: dict[str, None] = {}  # in the order of asking

    def note_assumptions(self, args: Any) -> None:
        """Note what was taken as given of the machine.

        Args:
            args: Validated by Megatron.
        """
        if self._packages:
            names = ", ".join(self._packages)
            self.note(f"packages that must be installed there, and are not here: {names}")
        if args.device == "cpu":
            return
        if args.transformer_impl == "transformer_engine":
            self.note(
                "the model was built from Megatron's local spec: layer numbers and parameter "
                "counts are those of Transformer Engine's"
            )
        if args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1:
            self.note("CUDA_DEVICE_MAX_CONNECTIONS=1 must be set there (GPUs before Blackwell)")
        self.note(
            f"taken as given: GPUs of compute capability {'.'.join(map(str, COMPUTE_CAPABILITY))} "
            f"(Hopper), Transformer Engine {TRANSFORMER_ENGINE} or newer; the GPUs themselves "
            "were not looked at"
        )

    def is_installed(self, module: str) -> bool:
        """Return True; remember the module where it is not here."""
        if not super().is_installed(module):
            self._packages[module] = None
        return True

    def version_below(self, package: str, least: str) -> str | None:
        """Return None; remember the version where the one that is here is older."""
        if super().version_below(package, least) is not None:
            self._packages[f"{package}>={least}"] = None
        return None

    def is_elsewhere(self, *paths: str) -> bool:
        """Return whether none of these paths is here, and all of them can be on another machine."""
        return all(map(_can_be_elsewhere, paths))

    def check_writable(self, flag: str, path: str) -> None:
        """Refuse a directory of output that cannot be made on any machine."""
        try:
            super().check_writable(flag, path)
        except UserError:
            if not self.is_elsewhere(path):
                raise
            self.note(f"{flag} {path}: cannot be made here; not tried")

    def stand_in_tokenizer(self, args: Any) -> Any | None:
        """Return a tokenizer of the size that the flags name, or of the likeliest one."""
        from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding

        files = (args.tokenizer_model, args.vocab_file, args.merge_file, args.metadata_path)
        absent = [path for path in files if path and self.is_elsewhere(path)]
        needs_library = args.tokenizer_type in TRANSFORMERS_TYPES
        if not absent and (not needs_library or super().is_installed("transformers")):
            return None
        size = args.vocab_size or _VOCABULARIES.get(args.tokenizer_type, _PAPER_VOCABULARY)
        if args.padded_vocab_size is not None:
            size = args.padded_vocab_size
            source = f"--padded-vocab-size {size}"
        elif args.vocab_size:
            source = f"--vocab-size {size}"
        else:
            source = f"{size} ids, an assumption: --vocab-size would tell"
        self.note(
            f"tokenizer {', '.join(absent) or args.tokenizer_type}: not here; the vocabulary is "
            f"that of {source}"
        )
        if args.padded_vocab_size is None:
            args.padded_vocab_size = vocab_size_with_padding(size, args, logging_enabled=False)
        return SimpleNamespace(vocab_size=size, eod=None)

    @contextmanager
    def known_to_megatron(self) -> Iterator[None]:
        """Answer Megatron's own questions about GPUs and Transformer Engine; let it open nothing.

        Its flags are parsed in this block, and its configurations are made.
        """
        import torch
        from megatron.core import utils
        from megatron.core.models.common.embeddings import rope_utils
        from megatron.core.transformer.moe import moe_utils
        from megatron.training import global_vars
        from packaging.version import Version

        major, minor = COMPUTE_CAPABILITY
        gpu = SimpleNamespace(major=major, minor=minor)
        purpose = PlannedMachine.known_to_megatron
        with undone_afterwards():
            for name in _OPENED:
                wrap(global_vars, f"_set_{name}", (), lambda stock, named: None, purpose)
            replace(torch.cuda, purpose, get_device_capability=lambda *args: COMPUTE_CAPABILITY)
            replace(torch.cuda, purpose, get_device_properties=lambda *args: gpu)
            replace(utils, purpose, _te_version=Version(TRANSFORMER_ENGINE))
            # Megatron asks whether these kernels were imported; none is called here.
            replace(rope_utils, purpose, fused_apply_rotary_pos_emb=_kernel)
            replace(moe_utils, purpose, **dict.fromkeys(_PERMUTATIONS.split(), _kernel))
            yield


def _kernel(*args: Any) -> Any:
    raise NotImplementedError


def _can_be_elsewhere(path: str) -> bool:
    """Return whether a path is not here, and can be elsewhere: nothing lies below a file."""
    if "://" in path or os.path.lexists(path):
        return False
    return next(place for place in Path(path).absolute().parents if place.exists()).is_dir()
