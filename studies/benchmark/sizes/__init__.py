"""The published sizes: tokens/s, MFU and peak memory of stock Megatron and ProRes, bf16 and FP8.

A row is a size in a precision. :mod:`~studies.benchmark.sizes.options` reads the command
line, :mod:`~studies.benchmark.sizes.plan` says which rows there are, in the order of their
importance, and how many layers of each fit on the GPU,
:mod:`~studies.benchmark.sizes.row` measures one of them in a process of its own,
:mod:`~studies.benchmark.sizes.results` keeps what is measured in a file, row by row,
:mod:`~studies.benchmark.sizes.flops` has the formula of MFU,
:mod:`~studies.benchmark.sizes.report` makes the table and the verdicts, and
:mod:`~studies.benchmark.sizes.main` runs it all within its time.
"""
