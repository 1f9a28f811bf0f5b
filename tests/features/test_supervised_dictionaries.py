"""Dictionaries from labels: what they fit, what their edits do, and how reconstructions are judged."""

import math

import pytest
import torch

from apportion.errors import InputError
from apportion.features.supervised_dictionaries import (
    Score,
    approximation,
    check_pairs,
    explained_variance,
    fit_supervised,
    necessity,
    sufficiency,
)

NAMES = ("Mary", "John", "Tom")
ORDERS = ("ABB", "BAB")
D = 12


def full_factorial(repeats: int = 3) -> dict[str, list[str]]:
    cells = [(io, s, pos) for io in NAMES for s in NAMES for pos in ORDERS] * repeats
    return dict(zip(("IO", "S", "Pos"), map(list, zip(*cells, strict=True)), strict=True))


def unbalanced(rows: int = 200) -> dict[str, list[str]]:
    """S tends to be what IO is not, and Pos follows IO."""
    generator = torch.Generator().manual_seed(1)
    io = torch.randint(3, (rows,), generator=generator)
    s = (io + torch.randint(1, 3, (rows,), generator=generator)) % 3
    pos = ((io == 0) & (torch.rand(rows, generator=generator) < 0.9)).long()
    return {
        "IO": [NAMES[each] for each in io.tolist()],
        "S": [NAMES[each] for each in s.tolist()],
        "Pos": [ORDERS[each] for each in pos.tolist()],
    }


def activations(table: dict[str, list[str]], noise: float = 0.0) -> torch.Tensor:
    """A sum of a vector a value, and noise."""
    generator = torch.Generator().manual_seed(0)
    vectors = {value: torch.randn(D, generator=generator) for value in (*NAMES, "S Mary", "S John", "S Tom", *ORDERS)}
    x = torch.stack(
        [
            vectors[io] + vectors[f"S {s}"] + vectors[pos]
            for io, s, pos in zip(table["IO"], table["S"], table["Pos"], strict=True)
        ]
    )
    return x + 1.5 + noise * torch.randn(x.shape, generator=generator)


def test_mean_and_mse_features_are_the_same_on_full_factorial_data() -> None:
    table = full_factorial()
    x = activations(table, noise=0.5)
    mean, mse = (fit_supervised(x, table, features=features) for features in ("mean", "mse"))
    torch.testing.assert_close(mean.decoder_weight, mse.decoder_weight, atol=1e-5, rtol=1e-5)
    assert mean.values == (NAMES, NAMES, ORDERS)
    assert mean.counts.tolist() == [18] * 6 + [27] * 2


def test_mean_features_of_an_attribute_sum_to_zero_weighted_by_frequency() -> None:
    table = unbalanced()
    fitted = fit_supervised(activations(table, noise=0.5), table, features="mean")
    shares = fitted.counts / len(table["IO"])
    for rows in (slice(0, 3), slice(3, 6), slice(6, 8)):
        weighted = shares[rows] @ fitted.decoder_weight[rows]
        torch.testing.assert_close(weighted, torch.zeros(D), atol=1e-5, rtol=0)


def test_mse_features_need_no_balance_and_mean_features_do() -> None:
    table = unbalanced()
    x = activations(table)
    mse, mean = (fit_supervised(x, table, features=features) for features in ("mse", "mean"))
    torch.testing.assert_close(mse.decode(mse.encode(table)), x, atol=1e-4, rtol=1e-4)
    assert explained_variance(x, mean.decode(mean.encode(table))) < 0.99


def test_mse_features_have_the_least_squared_error_of_all() -> None:
    table = unbalanced()
    x = activations(table, noise=1.0)
    fitted = fit_supervised(x, table)
    design = torch.cat([fitted.encode(table).to_dense(), torch.ones(len(x), 1)], dim=1).double()
    best = design @ torch.linalg.lstsq(design, x.double(), driver="gelsd").solution
    torch.testing.assert_close(fitted.decode(fitted.encode(table)).double(), best, atol=1e-4, rtol=1e-4)


def test_a_code_is_one_feature_an_attribute_and_decodes_as_the_sum_of_vectors() -> None:
    table = unbalanced()
    fitted = fit_supervised(activations(table), table, ["Pos", ("IO", "S")])
    codes = fitted.encode(table)
    assert codes.winners_per_row().tolist() == [2] * len(table["IO"])
    assert codes.values.unique().tolist() == [1.0]
    row = fitted.decoder_bias + fitted.decoder_weight[fitted.feature("Pos", table["Pos"][7])]
    row = row + fitted.decoder_weight[fitted.feature(("IO", "S"), (table["IO"][7], table["S"][7]))]
    torch.testing.assert_close(fitted.decode(codes)[7], row)


def test_coupled_mean_features_are_the_sum_of_independent_ones_under_independence() -> None:
    table = full_factorial()
    x = activations(table)
    apart = fit_supervised(x, table, features="mean")
    coupled = fit_supervised(x, table, [("IO", "Pos")], features="mean")
    for io in NAMES:
        both = coupled.decoder_weight[coupled.feature(("IO", "Pos"), (io, "BAB"))]
        summed = apart.decoder_weight[apart.feature("IO", io)] + apart.decoder_weight[apart.feature("Pos", "BAB")]
        torch.testing.assert_close(both, summed, atol=1e-5, rtol=1e-5)


def test_a_redundant_attribute_changes_no_mse_prediction_but_is_counted_twice_by_means() -> None:
    table = full_factorial()
    x = activations(table)
    doubled = {**table, "IO again": [name.upper() for name in table["IO"]]}
    once, twice = (fit_supervised(x, each) for each in (table, doubled))
    torch.testing.assert_close(
        once.decode(once.encode(table)), twice.decode(twice.encode(doubled)), atol=1e-4, rtol=1e-4
    )
    mean = fit_supervised(x, doubled, features="mean")
    overshoot = mean.decode(mean.encode(doubled)) - x
    io_part = torch.stack([mean.decoder_weight[mean.feature("IO", name)] for name in table["IO"]])
    torch.testing.assert_close(overshoot, io_part, atol=1e-4, rtol=1e-4)


def swapped(table: dict[str, list[str]], attribute: str) -> dict[str, list[str]]:
    values = ORDERS if attribute == "Pos" else NAMES
    return {**table, attribute: [values[(values.index(v) + 1) % len(values)] for v in table[attribute]]}


@pytest.mark.parametrize("attribute", ["IO", "S", "Pos"])
def test_an_edit_of_exactly_additive_data_gives_the_counterfactual(attribute: str) -> None:
    table = unbalanced()
    after = swapped(table, attribute)
    x, target = activations(table), activations(after)
    fitted = fit_supervised(x, table)
    torch.testing.assert_close(fitted.edit(x, table, after), target, atol=1e-4, rtol=1e-4)
    assert fitted.removed(table, after).sum(dim=1).tolist() == [1] * len(x)


def test_an_edit_to_the_same_value_changes_nothing_and_there_and_back_is_the_identity() -> None:
    table = unbalanced()
    x = activations(table, noise=1.0)
    fitted = fit_supervised(x, table)
    assert torch.equal(fitted.edit(x, table, table), x)
    after = swapped(table, "S")
    torch.testing.assert_close(fitted.edit(fitted.edit(x, table, after), after, table), x, atol=1e-5, rtol=1e-5)


def score_of(x: dict[str, torch.Tensor]) -> "callable":
    """A model that reads one direction at two places, and not linearly."""
    direction = torch.randn(D, generator=torch.Generator().manual_seed(5))

    def run(values: dict[str, torch.Tensor]) -> torch.Tensor:
        here = {**x, **values}
        return 3 + (here["a"] @ direction).square() / 100 + here["b"] @ direction / 10

    return run


def test_a_perfect_dictionary_is_sufficient_and_necessary() -> None:
    table = unbalanced()
    x = {place: activations(table, noise=float(noise)) for noise, place in enumerate("ab")}
    mean = {place: each.mean(dim=0) for place, each in x.items()}
    found = approximation(score_of(x), x, x, mean)
    assert found.sufficiency.value == pytest.approx(1)
    assert found.necessity.value == pytest.approx(1)


def test_an_empty_dictionary_is_as_sufficient_as_mean_ablation_and_not_necessary() -> None:
    table = unbalanced()
    x = {place: activations(table, noise=float(noise)) for noise, place in enumerate("ab")}
    mean = {place: each.mean(dim=0) for place, each in x.items()}
    empty = {place: mean[place].expand_as(each) for place, each in x.items()}
    found = approximation(score_of(x), x, empty, mean)
    assert found.sufficiency.value == pytest.approx(found.ablated / found.clean)
    assert found.necessity.value == pytest.approx(0, abs=1e-5)


def test_an_overshoot_counts_against_necessity() -> None:
    assert necessity(without=-3.0, ablated=-1.0, clean=4.0).value == pytest.approx(0.6)
    assert necessity(without=1.0, ablated=-1.0, clean=4.0).value == pytest.approx(0.6)


@pytest.mark.parametrize("score", [necessity(0.5, 4.0, 4.0), necessity(0.0, 4.0001, 4.0), sufficiency(1.0, 0.0)])
def test_a_denominator_of_nothing_gives_nan_and_says_why(score: Score) -> None:
    assert math.isnan(score.value)
    assert score.reason


def test_bad_input_is_named() -> None:
    table = full_factorial()
    x = activations(table)
    fitted = fit_supervised(x, table)
    with pytest.raises(InputError, match=r"'IO' has no vector for the value 'Eve'"):
        fitted.encode({**table, "IO": ["Eve"] * len(x)})
    with pytest.raises(InputError, match="rank 6 for 8 features"):
        fit_supervised(x, table, solver="inv")
    with pytest.raises(InputError, match="'Gender' is not in the table"):
        fit_supervised(x, table, ["Gender"])
    with pytest.raises(InputError, match="none twice"):
        fit_supervised(x, table, ["IO", "IO"])
    with pytest.raises(InputError, match="differ in length"):
        fit_supervised(x, {**table, "Pos": ["ABB"]})
    with pytest.raises(InputError, match="54 values for 5 activations"):
        fit_supervised(x[:5], table)
    with pytest.raises(InputError, match="NaN"):
        fit_supervised(x.clone().index_fill_(0, torch.tensor([3]), torch.nan), table)
    with pytest.raises(InputError, match="places differ"):
        approximation(lambda values: x[:, 0], {"a": x}, {"b": x}, {"a": x[0]})


def test_one_attribute_has_a_unique_solution() -> None:
    table = unbalanced()
    x = activations(table, noise=1.0)
    unique, least = (fit_supervised(x, table, ["IO"], solver=solver) for solver in ("inv", "pinv"))
    torch.testing.assert_close(unique.decoder_weight, least.decoder_weight, atol=1e-5, rtol=1e-5)


def test_pairs_must_differ_in_the_edited_attribute_alone() -> None:
    table = full_factorial(1)
    check_pairs(table, swapped(table, "S"), "S")
    with pytest.raises(InputError, match=r"pair 0 .* differs in \['IO', 'S'\]"):
        check_pairs(table, swapped(swapped(table, "S"), "IO"), "S")
    with pytest.raises(InputError, match="differs in nothing"):
        check_pairs(table, table, "S")
