"""What ProRes costs: stock Megatron against ProRes on the same model, in one process.

:mod:`~megatron_prores.benchmark.options` reads the command line,
:mod:`~megatron_prores.benchmark.trainee` builds models and runs whole training steps of them,
:mod:`~megatron_prores.benchmark.measure` times them in turn and counts their memory,
:mod:`~megatron_prores.benchmark.report` prints and writes what came out, and
:mod:`~megatron_prores.benchmark.main` says which models are compared.
"""
