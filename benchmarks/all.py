"""Importing this fills the registry, in the order in which benchmarks run."""

import importlib

for _name in (
    *("step", "step_parts", "scaling", "memory", "million", "harvest", "report", "keys", "prefill"),
    *("spmm", "monarch"),
):
    importlib.import_module(f"benchmarks.{_name}")
