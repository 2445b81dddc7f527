"""The published sizes: tokens/s, MFU and peak memory of stock Megatron and ProRes, bf16 and FP8.

A row is a size in a precision. :mod:`~megatron_prores.benchmark.sizes.options` reads the command
line, :mod:`~megatron_prores.benchmark.sizes.plan` says which rows there are, in the order of their
importance, and how many layers of each fit on the GPU,
:mod:`~megatron_prores.benchmark.sizes.row` measures one of them in a process of its own,
:mod:`~megatron_prores.benchmark.sizes.results` keeps what is measured in a file, row by row,
:mod:`~megatron_prores.benchmark.sizes.flops` has the formula of MFU,
:mod:`~megatron_prores.benchmark.sizes.report` makes the table and the verdicts, and
:mod:`~megatron_prores.benchmark.sizes.main` runs it all within its time.
"""
