import numpy as np
import pytest

from apportion.errors import InputError
from apportion.features.power_law import fit_power_law

WIDTHS = [1024.0 * 2**each for each in range(6)]


def test_planted_numbers_are_found() -> None:
    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(6)
    truth = [0.2 + 40 * width**-0.8 for width in WIDTHS]
    law = fit_power_law(WIDTHS, (truth * noise).tolist())
    assert law.constant == pytest.approx(0.2, rel=0.05)
    assert law(4000) == pytest.approx(0.2 + 40 * 4000**-0.8, rel=0.05)
    exact = fit_power_law(WIDTHS, truth)
    assert exact.constant == pytest.approx(0.2, rel=0.05)
    assert exact.exponent == pytest.approx(-0.8, rel=0.05)
    assert exact.factor == pytest.approx(40, rel=0.2)
    assert law.errors[0] > exact.errors[0]


def test_three_widths_give_a_law_without_errors_and_two_none() -> None:
    assert fit_power_law(WIDTHS[:3], [0.5, 0.4, 0.35]).errors == (np.inf, np.inf, np.inf)
    with pytest.raises(InputError, match="2 widths cannot decide"):
        fit_power_law([1.0, 2.0, 2.0], [0.5, 0.4, 0.4])
    with pytest.raises(InputError, match="above 0"):
        fit_power_law(WIDTHS[:3], [0.5, 0.4, 0.0])
