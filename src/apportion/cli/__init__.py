"""The command line: ``apportion fetch | train | evaluate | compare | report | study | doctor``."""

from apportion.cli.app import main

__all__ = ["main"]
