"""The planner: what a command line will do on how many GPUs, told without one.

``tools/plan.py`` is its command; :func:`megatron_prores.plan.planner.make_plan` is its entry from
Python. The parts, in the order in which they act:

- :mod:`~megatron_prores.plan.options`: the planner's own command line;
- :mod:`~megatron_prores.plan.elsewhere`: what is the target machine's business;
- :mod:`~megatron_prores.plan.groups`: the process groups of every rank, by Megatron's own code;
- :mod:`~megatron_prores.plan.model`: the model chunks of every stage, on the meta device;
- :mod:`~megatron_prores.plan.holding`: who holds which layers, through the audit of a real run;
- :mod:`~megatron_prores.plan.memory`: bytes;
- :mod:`~megatron_prores.plan.build`, :mod:`~megatron_prores.plan.figures`: the plan, part by part;
- :mod:`~megatron_prores.plan.report`, :mod:`~megatron_prores.plan.picture`: what the user sees.
"""
