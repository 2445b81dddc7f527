"""The main program, with every alpha that its layers really held written down."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from megatron_prores.command_line import device
from megatron_prores.command_line.arguments import read_prores_flags
from tests.distributed.launch import MAIN_PROGRAM, _record_alphas

if __name__ == "__main__":
    directory, *argv = sys.argv[1:]
    # As the main program does, before anything imports Megatron.
    device.prepare(read_prores_flags(argv)[1])
    _record_alphas(Path(directory, "alphas0.jsonl"))
    sys.argv = [str(MAIN_PROGRAM), *argv]
    runpy.run_path(str(MAIN_PROGRAM), run_name="__main__")
