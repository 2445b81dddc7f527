"""The planner: what a command line will do on how many GPUs, told without one.

``tools/plan.py`` is its command (:mod:`~megatron_prores.plan.main`), and
:func:`megatron_prores.plan.planner.make_plan` its entry from Python.
:mod:`~megatron_prores.plan.build` puts a plan together: the command line parsed for the
:mod:`~megatron_prores.plan.target` machine, process :mod:`~megatron_prores.plan.groups`, what the
pipeline :mod:`~megatron_prores.plan.stages` hold, audited, divisions of the
:mod:`~megatron_prores.plan.layout`, and :mod:`~megatron_prores.plan.memory`.
:mod:`~megatron_prores.plan.report` and :mod:`~megatron_prores.plan.picture` show it.
"""
