"""Shared-context task on code: find the function that a sentence describes, in the standard library's source.

After Code.RepoQA of SCBench (arXiv 2412.10319; Liu and others, 2024, arXiv 2406.06025). There a model has written the
descriptions; here they are the first sentence of the function's own docstring, which stays in the code.
"""

import ast
import functools
import random
import textwrap

from apportion.data.corpora import python_files, standard_library
from apportion.data.tasks.shared_context import SharedContext, Turn
from apportion.errors import InputError

ANSWERS = ("source", "name")
_MODULES = (
    *("ast", "bisect", "calendar", "colorsys", "configparser", "copy", "csv", "difflib", "dis", "fnmatch"),
    *("fractions", "functools", "glob", "heapq", "inspect", "ipaddress", "linecache", "mailbox", "mimetypes", "ntpath"),
    *("operator", "os", "pathlib", "pickletools", "platform", "posixpath", "pprint", "random", "shlex", "shutil"),
    *("socket", "statistics", "string", "tarfile", "tempfile", "textwrap", "tokenize", "trace", "traceback", "types"),
    *("typing", "uuid", "warnings", "zipfile"),
)


def repo_qa(
    count: int, *, functions: int = 12, turns: int = 3, answer: str = "source", seed: int = 0
) -> list[SharedContext]:
    """Contexts of short functions of the standard library; turns give the first line of a docstring and ask whose.

    Args:
        count: how many contexts.
        functions: in each, all with different descriptions.
        turns: questions about each, all for different functions.
        answer: ``source``, the paper's, or ``name``, which small models can do.
        seed: of the draws.

    Raises:
        InputError: more turns than functions, more functions than there are, an unknown answer.
    """
    known = short_functions()
    if not 1 <= turns <= functions <= len(known):
        raise InputError(f"turns={turns}, functions={functions}: 1 <= turns <= functions <= {len(known)}")
    if answer not in ANSWERS:
        raise InputError(f"answer={answer!r}: {' or '.join(ANSWERS)}")
    draws = random.Random(f"repo_qa {seed}")
    made = []
    for _ in range(count):
        chosen = draws.sample(sorted(known), functions)
        context = "\n\n\n".join(known[each] for each in chosen) + "\n\n\n"
        asked = draws.sample(chosen, turns)
        made.append(SharedContext(context, tuple(function_turn(each, known[each], answer) for each in asked)))
    return made


@functools.cache
def short_functions(shortest: int = 3, longest: int = 12) -> dict[str, str]:
    """Functions of some modules of the standard library by the first line of their docstring, lines counted."""
    found: dict[str, str] = {}
    twice: set[str] = set()
    wanted = {f"{name}.py" for name in _MODULES}
    for _, path in python_files("python", standard_library()):
        if path.name not in wanted or path.parent != standard_library():
            continue
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or node.decorator_list:
                continue
            text = _source(source, node)
            said = (ast.get_docstring(node) or "").split("\n")[0].strip()
            if not shortest <= text.count("\n") + 1 <= longest or len(said) < 20 or not said.endswith("."):
                continue
            if '"' in said or said not in text or "\n\n\n" in text:
                continue
            if said in found:
                twice.add(said)
            found[said] = text
    return {said: text for said, text in found.items() if said not in twice}


def _source(source: str, node: ast.FunctionDef) -> str:
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    return textwrap.dedent("\n".join(lines)).strip()


def function_turn(said: str, text: str, answer: str, part: str = "") -> Turn:
    """The question for a function, or for its name, by the first line of its docstring."""
    asks = f'# The function whose docstring says "{said}"'
    if answer == "name":
        name = text.removeprefix("def ").partition("(")[0]
        return Turn(f"\n{asks} is called", f" {name}", part=part)
    return Turn(f"\n{asks}:\n", f"{text}\n\n", "most_similar", part)
