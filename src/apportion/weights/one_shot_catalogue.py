"""Every one-shot method by its name, as `apportion prune` has them; a new one is a file of its own and a line here."""

from collections.abc import Callable
from dataclasses import dataclass

from apportion.errors import InputError
from apportion.weights.dsnot import DSnoT
from apportion.weights.one_shot_method import OneShotMethod
from apportion.weights.sparsegpt import SparseGPT
from apportion.weights.wanda import Magnitude, Wanda


@dataclass(frozen=True)
class Offered:
    """A method that can be asked for by name.

    Attributes:
        make: with its defaults.
        says: what it does, in a line.
    """

    make: Callable[[], OneShotMethod]
    says: str


CATALOGUE: dict[str, Offered] = {
    "magnitude": Offered(Magnitude, "the largest weights stay: what every method has to beat"),
    "wanda": Offered(Wanda, "weights by size times the norm of their input; none is changed"),
    "sparsegpt": Offered(SparseGPT, "what is left of a row makes up for what goes"),
    "dsnot": Offered(DSnoT, "Wanda's mask, then swaps until the mean output is right"),
    "dsnot_reference": Offered(
        lambda: DSnoT(preset="reference"), "the same as published: 50 swaps whatever the width, attention only"
    ),
    "dsnot_magnitude": Offered(lambda: DSnoT(start="magnitude"), "swaps that begin with the largest weights"),
    "second_moment_swaps": Offered(
        lambda: DSnoT(objective="second_moment"), "Wanda's mask, then swaps that make the squared error smaller"
    ),
}


def one_shot_method(name: str) -> OneShotMethod:
    """A method by its name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in CATALOGUE:
        raise InputError(f"method {name!r}: one of {', '.join(CATALOGUE)}")
    return CATALOGUE[name].make()
