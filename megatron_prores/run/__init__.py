"""Around a run: signals and faults, one writer per ``--save``, the process that saves beside it."""
