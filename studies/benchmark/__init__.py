"""What ProRes costs, and how fast training is: stock Megatron against ProRes, in one process.

Two suites share what is here. :mod:`~studies.benchmark.placements` compares the norm
placements at one size, on a laptop too; :mod:`~studies.benchmark.sizes` measures the
published sizes on a GPU, in bf16 and FP8.

:mod:`~studies.benchmark.model` holds the models and Megatron's flags for them,
:mod:`~studies.benchmark.trainee` builds them and runs whole training steps,
:mod:`~studies.benchmark.measure` times them in turn and counts their memory, and
:mod:`~studies.benchmark.machine` says on what.
"""
