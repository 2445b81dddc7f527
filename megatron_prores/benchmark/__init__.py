"""What ProRes costs, and how fast training is: stock Megatron against ProRes, in one process.

Two suites share what is here. :mod:`~megatron_prores.benchmark.placements` compares the norm
placements at one size, on a laptop too; :mod:`~megatron_prores.benchmark.sizes` measures the
published sizes on a GPU, in bf16 and FP8.

:mod:`~megatron_prores.benchmark.model` holds the models and Megatron's flags for them,
:mod:`~megatron_prores.benchmark.trainee` builds them and runs whole training steps,
:mod:`~megatron_prores.benchmark.measure` times them in turn and counts their memory, and
:mod:`~megatron_prores.benchmark.machine` says on what.
"""
