"""What the documentation shows, works: docstring examples, and the Python in README.md and docs/."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import apportion

ROOT = Path(__file__).parents[1]
# A block below this comment needs what no test machine must have, such as a fetched model.
NOT_RUN = "<!-- not run by the tests"
BLOCK = re.compile(r"(?P<before>[^\n]*)\n+```python\n(?P<code>.*?)```", re.DOTALL)


def modules_with_examples() -> list[str]:
    """Names of the modules whose source shows a doctest prompt."""
    source = Path(apportion.__file__).parent
    files = [file for file in sorted(source.rglob("*.py")) if ">>> " in file.read_text(encoding="utf-8")]
    return [".".join(file.relative_to(source.parent).with_suffix("").parts).removesuffix(".__init__") for file in files]


def python_blocks(page: Path) -> list[str]:
    """The page's Python blocks that tests can run, in order."""
    text = page.read_text(encoding="utf-8")
    return [match["code"] for match in BLOCK.finditer(text) if not match["before"].startswith(NOT_RUN)]


# The tutorial on a model of this test's own: the same code, but seconds instead of minutes.
SMALLER = {
    '"layers.15.residual"': '"layers.1.residual"',
    "tokens=100_000": "tokens=40_000, progress=False",
    "contexts=16": "contexts=2",
    "n_features=4608, steps=300, batch_size=2048": "n_features=128, steps=10, batch_size=256",
    'folder="runs/mutual"': 'folder="runs/mutual", progress=False',
}

PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if python_blocks(page)]


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstring_examples_give_what_they_show(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for code in python_blocks(page):
        for shown, tried in {'"smollm2"': repr(str(tiny_llama)), **SMALLER}.items():
            code = code.replace(shown, tried)
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("shown", SMALLER)
def test_what_the_tutorial_is_shrunk_by_is_still_in_it(shown: str) -> None:
    assert shown in (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
