"""Measures `apportion` against the physical limit and against the libraries people use: ``python -m benchmarks``.

- ``registry`` and ``runner``: what a benchmark is, and the one way to run it;
- ``problem``, ``contenders``, ``peers``: the data and the training steps that are compared;
- ``step``, ``step_parts``, ``scaling``, ``memory``, ``harvest``, ``report``: one file a benchmark;
- ``tables``, ``page``, ``command``: what people see.

Not part of the wheel. A benchmark claims ratios only: everything in one race is measured side by side in one run.
"""

import os

# torch's profiler writes a line to stderr at every start and stop unless it is told not to before torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
