"""Benchmarks of the workbench: ``python -m workbench.bench NAME``. Same shape as `engine.bench`: a table, then one JSON line.

A benchmark module has a docstring that explains its physics, ``add_arguments(parser)`` and ``run(args) -> dict``.
"""
