"""Run the study: ``python -m studies.paper``, from the repository or with PYTHONPATH."""

from megatron_prores.errors import run_program
from studies.paper.main import main

if __name__ == "__main__":
    run_program(main)
