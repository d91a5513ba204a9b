"""Latency-constrained Multi-Dimensional Pruning (MDP) for MMDetection3D.

The package is one straight line of data, see ``docs/method.md``::

    trace_space -> collect_importance + measure_latency -> build_problem -> solve -> apply_plan -> export

Importing it costs nothing: every stage imports only what it needs.
"""

__version__ = "0.1.0"
