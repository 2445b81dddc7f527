"""The doctor: what is installed and how the machine is, what is missing, and what that costs.

``python -m megatron_prores.doctor`` prints a line per thing. Every check is a small function in one
of the tables of :mod:`~megatron_prores.doctor.packages`, :mod:`~megatron_prores.doctor.gpus`,
:mod:`~megatron_prores.doctor.fabric` and :mod:`~megatron_prores.doctor.machine`. A check changes
nothing, takes no memory of a GPU, and never prints a secret.
"""
