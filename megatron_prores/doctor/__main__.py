"""``python -m megatron_prores.doctor``."""

from megatron_prores.doctor.main import main
from megatron_prores.errors import run_program

if __name__ == "__main__":
    run_program(main)
