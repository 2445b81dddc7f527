"""torchrun with the exit code of the run, and what the nodes of a job know of each other."""
