"""One study a published system: its claim, measured against its baseline at equal budget, with a computed verdict."""

from apportion.studies.finding import Comparison, Finding, Row, by_condition, overall
from apportion.studies.machine import machine
from apportion.studies.registry import SYSTEMS, Entry, entry
from apportion.studies.run import all_studies, last_finding, run, write_results

__all__ = [
    "SYSTEMS",
    "Comparison",
    "Entry",
    "Finding",
    "Row",
    "all_studies",
    "by_condition",
    "entry",
    "last_finding",
    "machine",
    "overall",
    "run",
    "write_results",
]
