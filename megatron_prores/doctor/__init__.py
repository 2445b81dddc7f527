"""Check what a machine has, what is missing, and what that costs a run.

``python -m megatron_prores.doctor`` first asks programs and imports packages, side by side
(:mod:`~megatron_prores.doctor.facts`). Then the small functions in the tables of
:mod:`~megatron_prores.doctor.packages` and :mod:`~megatron_prores.doctor.machine` judge, one line
each. Nothing is changed, no GPU memory is taken, and no secret is printed.
"""
