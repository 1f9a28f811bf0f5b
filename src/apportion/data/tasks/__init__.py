"""Tasks made on the spot: pairs of prompts, with and without what decides the answer."""

from apportion.data.tasks.docstring import docstring
from apportion.data.tasks.greater_than import greater_than
from apportion.data.tasks.ioi import ioi
from apportion.data.tasks.pairs import Prompt, PromptPairs

TASKS = {"ioi": ioi, "greater_than": greater_than, "docstring": docstring}

__all__ = ["TASKS", "Prompt", "PromptPairs", "docstring", "greater_than", "ioi"]
