"""How error falls with the width of a dictionary: a power law above a floor that no width takes away.

Engels, Smith & Tegmark 2024 (arXiv 2410.14670), whose ``c + a * width ** m`` is here ``constant``, ``factor`` and
``exponent``; they fit it by Adam and read the floor as the part of the error that is not linear in the activation.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apportion.errors import InputError


@dataclass(frozen=True)
class PowerLaw:
    """``FVU(width) = constant + factor * width ** exponent``, with a negative exponent.

    Attributes:
        constant: what no width explains; the paper reads it as the nonlinear part.
        factor, exponent: of the rest.
        errors: standard errors of the three, from the fit's curvature; infinite with three widths.
    """

    constant: float
    factor: float
    exponent: float
    errors: tuple[float, float, float]

    def __call__(self, width: float) -> float:
        """The FVU that it gives a width."""
        return self.constant + self.factor * width**self.exponent


def fit_power_law(widths: Sequence[float], fvu: Sequence[float]) -> PowerLaw:
    """Fit the law, each width weighing by its relative error (ours; the paper fits by Adam).

    Raises:
        InputError: fewer than three different widths; widths or FVUs that are not positive.
    """
    from scipy.optimize import curve_fit

    x, y = np.asarray(widths, dtype=float), np.asarray(fvu, dtype=float)
    if x.shape != y.shape or len(np.unique(x)) < 3:
        raise InputError(f"{len(np.unique(x))} widths cannot decide the three numbers of a power law: give at least 3")
    if not (x > 0).all() or not (y > 0).all():
        raise InputError("widths and FVUs must be above 0 for a power law")
    centre = float(np.exp(np.log(x).mean()))

    def law(width: Any, constant: float, factor: float, exponent: float) -> Any:
        return constant + factor * (width / centre) ** exponent

    start = (0.5 * y.min(), max(y.mean() - 0.5 * y.min(), 1e-6), -0.5)
    bounds = ([0, 0, -4], [y.max(), 10 * y.max(), -1e-3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # With three widths there is no residual to estimate errors from.
        found, covariance = curve_fit(law, x, y, p0=start, sigma=y, bounds=bounds, maxfev=20_000)
    constant, factor, exponent = (float(each) for each in found)
    spread = np.sqrt(np.diag(covariance)) if len(x) > 3 else np.full(3, np.inf)
    scale = centre**-exponent
    return PowerLaw(constant, factor * scale, exponent, (float(spread[0]), float(spread[1] * scale), float(spread[2])))
