"""`import apportion` is quick because it imports nothing heavy; each name loads its own home on first use."""

import subprocess
import sys

import pytest

import apportion

HEAVY = ("transformers", "matplotlib", "triton", "numba", "sklearn", "jinja2", "typer")


def heavy_modules_after(statement: str) -> list[str]:
    """Run a statement in a fresh interpreter and name the heavy packages it brought in."""
    script = f"import sys\n{statement}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("floor", ["apportion", "apportion.errors", "apportion.data.files"])
def test_importing_the_lowest_floors_brings_in_nothing_heavy(floor: str) -> None:
    assert heavy_modules_after(f"import {floor}") == []


@pytest.mark.parametrize("name", ["MutualChoice", "SparseAutoencoder", "load"])
def test_using_a_public_name_leaves_the_slow_packages_alone(name: str) -> None:
    brought_in = heavy_modules_after(f"import apportion\napportion.{name}")
    assert {"transformers", "matplotlib", "triton", "sklearn"}.isdisjoint(brought_in)


@pytest.mark.parametrize("name", [name for name in apportion.__all__ if name != "__version__"])
def test_every_public_name_resolves_to_an_object_of_that_name(name: str) -> None:
    assert getattr(apportion, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error_that_says_so() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Budget'"):
        _ = apportion.Budget


def test_dir_lists_what_has_not_been_loaded_yet() -> None:
    assert set(apportion.__all__) <= set(dir(apportion))
