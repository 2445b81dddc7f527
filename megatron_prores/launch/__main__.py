"""``python -m megatron_prores.launch``."""

import sys

from megatron_prores.errors import run_program
from megatron_prores.launch.main import main

run_program(lambda: main(sys.argv[1:]))
