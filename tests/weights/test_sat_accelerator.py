import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.errors import InputError
from apportion.weights.sat_accelerator import Product, Sat
from apportion.weights.training_shapes import LayerShape, WeightSparsity, resnet18, vit_small
from systolic_events import Hazard, masked_product, output_stationary, weight_stationary

TINY = Sat(rows=4, columns=4, adder_latency=3, interleave=2)
ROOMY = {"bandwidth": 1e15}  # memory never counts
PRODUCTS = st.builds(
    lambda p, groups, q, pattern: Product(p, groups * pattern[1], q, *pattern),
    st.integers(1, 70),
    st.integers(1, 9),
    st.integers(1, 70),
    st.sampled_from([(1, 1), (1, 4), (2, 4), (2, 8)]),
)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("sizes", [(4, 8, 4), (9, 8, 7), (3, 20, 10), (13, 4, 1)])
@pytest.mark.parametrize(("latency", "interleave"), [(1, 1), (3, 1), (3, 2), (3, 3), (3, 5)])
def test_the_array_register_by_register_needs_these_cycles_output_stationary(sizes, n, m, latency, interleave):
    p, k, q = sizes
    a, b = masked_product(p, k, q, n, m)
    sat = replace(TINY, adder_latency=latency, interleave=interleave)
    out, cycles = output_stationary(a, b, n, m, rows=4, columns=4, latency=latency, interleave=interleave)
    assert torch.equal(out, a @ b)
    assert cycles == sat.output_stationary(Product(p, k, q, n, m))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (2, 4), (3, 4)])
@pytest.mark.parametrize("sizes", [(4, 8, 4), (9, 8, 7), (3, 20, 10), (13, 36, 1)])
@pytest.mark.parametrize(("rows", "columns", "hop"), [(4, 4, 1), (2, 3, 1), (3, 2, 4)])
def test_the_array_register_by_register_needs_these_cycles_weight_stationary(sizes, n, m, rows, columns, hop):
    p, k, q = sizes
    a, b = masked_product(p, k, q, n, m)
    out, cycles = weight_stationary(a, b, n, m, rows=rows, columns=columns, hop=hop)
    assert torch.equal(out, a @ b)
    sat = replace(TINY, rows=rows, columns=columns, sum_hop=hop)
    assert cycles == sat.weight_stationary(Product(p, k, q, n, m))


def test_the_array_notices_a_sum_that_is_used_too_early(monkeypatch):
    # The check of the check: were latency not waited for, the simulated units would say so.
    import systolic_events

    a, b = masked_product(4, 8, 4, 1, 1)
    monkeypatch.setattr(systolic_events, "max", lambda *values: values[0], raising=False)
    with pytest.raises(Hazard, match="2 cycles too early"):
        output_stationary(a, b, 1, 1, rows=4, columns=4, latency=3, interleave=1)


@settings(max_examples=150, deadline=None)
@given(PRODUCTS, st.sampled_from([1, 2, 8, 16]))
def test_no_product_takes_fewer_cycles_than_its_multiplications(product, interleave):
    sat = replace(TINY, interleave=interleave)
    for cycles in (sat.output_stationary(product), sat.weight_stationary(product)):
        assert cycles * sat.rows * sat.columns >= product.macs


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 70), st.sampled_from([4, 8]))
def test_fewer_weights_never_take_longer(p, groups, q, m):
    of_n = [TINY.choose(Product(p, groups * m, q, n, m))[1] for n in range(1, m)]
    of_n.append(TINY.choose(Product(p, groups * m, q))[1])
    assert of_n == sorted(of_n)


@settings(max_examples=100, deadline=None)
@given(PRODUCTS)
def test_the_scheduler_is_never_worse_than_one_dataflow_for_all(product):
    best = TINY.choose(product)[1]
    assert best <= min(TINY.output_stationary(product), TINY.weight_stationary(product))
    assert best == min(replace(TINY, schedule=each).choose(product)[1] for each in ("OS", "WS"))


def test_interleaving_hides_the_adders_latency():
    product = Product(64, 100, 64)  # 256 tiles of 4 x 4
    by_interleave = {
        each: replace(TINY, adder_latency=8, interleave=each, hide_drain=True).output_stationary(product)
        for each in (1, 8, 16)
    }
    assert by_interleave[1] == 256 * (100 * 8 + 6)
    assert by_interleave[8] == 32 * (100 * 8 + 6)
    assert by_interleave[16] == 16 * (100 * 16 + 6)


def test_twice_as_many_rows_take_twice_as_long_to_stream():
    fill = TINY.rows + TINY.columns - 2
    tiles, first = 3 * 2, TINY.rows * 2
    for p in (8, 16, 32):
        assert TINY.weight_stationary(Product(p, 3 * 4 * 8, 8, 2, 8)) == tiles * (p * 2 + fill) + first


def test_bytes_are_those_counted_by_hand():
    shape = LayerShape("a", 16, 32, 9, positions_in=64, positions_out=16)
    sat, sparsity = Sat(), WeightSparsity(2, 8)
    given_, made, weights = 5 * 64 * 16, 5 * 16 * 32, 16 * 32 * 9
    kept = weights // 4 * (2 + 3 / 8)  # two bytes and three bits each
    assert sat.traffic(shape, "FF", 5) == 2 * (given_ + made + weights)
    assert sat.traffic(shape, "FF", 5, sparsity) == 2 * (given_ + made) + kept
    assert sat.traffic(shape, "BP", 5, sparsity) == 2 * (given_ + made) + kept
    assert sat.traffic(shape, "WU", 5, sparsity) == 2 * (given_ + made) + 4 * weights
    unsorted = replace(sat, pregenerate=False)
    assert unsorted.traffic(shape, "FF", 5, sparsity) == 2 * (given_ + made) + 4 * weights
    assert unsorted.traffic(shape, "FF", 5) == 2 * (given_ + made + weights)


def test_what_does_not_fit_on_chip_is_read_again():
    shape = LayerShape("a", 64, 64)  # 8192 bytes of weights, 12,800 of activations either way
    assert Sat(buffer_bytes=8192).traffic(shape, "FF", 100) == 2 * 12_800 + 8192
    small = Sat(buffer_bytes=4096).traffic(shape, "FF", 100)
    assert small == 12_800 + min(12_800 + 4 * 8192, 8192 + 2 * 12_800)


@pytest.mark.parametrize(("n", "m", "smaller"), [(2, 4, True), (7, 8, False), (6, 8, True), (15, 16, False)])
def test_compact_weights_are_smaller_only_if_values_and_indices_are(n, m, smaller):
    index = (m - 1).bit_length()
    assert (n / m * (16 + index) / 16 < 1) is smaller
    assert (Sat().stored(1024, WeightSparsity(n, m)) < 2048) is smaller
    assert Sat().stored(1024, WeightSparsity(n, m)) <= 2048


def test_n_equal_to_m_is_dense_training():
    layers = resnet18(32)
    assert Sat().step(layers, 8, WeightSparsity(8, 8)).cycles == Sat().step(layers, 8).cycles


def test_the_whole_step_speeds_up_as_far_as_the_three_products_allow():
    layers = resnet18(32)
    step = Sat(**ROOMY).step

    def cycles(sparsity=None):
        return sum(each.cycles for each in step(layers, 64, sparsity).parts if each.dataflow)

    assert 0.85 < step(layers, 64).utilisation < 0.9
    for m, least, most in ((4, 1.48, 1.52), (8, 1.95, 2.01), (16, 2.33, 2.41)):
        assert least < cycles() / cycles(WeightSparsity(2, m)) < most
    assert 1.2 < cycles() / cycles(WeightSparsity(2, 8, backward=False)) < 1.34
    assert 1.3 < cycles() / cycles(WeightSparsity(2, 8, forward=False)) < 1.45
    dense, sparse = (step(layers, 64, each).cycles for each in (None, WeightSparsity(2, 8)))
    assert 1.5 < dense / sparse < cycles() / cycles(WeightSparsity(2, 8)), "optimiser and norms cost the same"


def test_each_optimisation_saves_cycles():
    layers, sparsity = resnet18(32), WeightSparsity(2, 8)
    best = Sat().step(layers, 4, sparsity).cycles
    for change in (
        {"interleave": 1},
        {"pregenerate": False},
        {"schedule": "OS"},
        {"schedule": "WS"},
        {"overlap": False},
    ):
        assert replace(Sat(), **change).step(layers, 4, sparsity).cycles > best


def test_sorting_is_counted_once():
    shape = LayerShape("a", 64, 128)
    sat, sparsity = Sat(vector_lanes=16, sort_lanes=4, **ROOMY), WeightSparsity(2, 8)
    hidden = {each.part: each for each in sat.step([shape], 2, sparsity).parts}
    assert hidden["optimiser"].cycles == 2 * 8192 / 4  # both directions, slower than the update itself
    assert hidden["FF"].waiting == hidden["BP"].waiting == 0
    waited = {each.part: each for each in replace(sat, pregenerate=False).step([shape], 2, sparsity).parts}
    assert waited["optimiser"].cycles == 8192 / 16
    assert waited["FF"].waiting == waited["BP"].waiting == 8192 / 4
    assert waited["WU"].waiting == 0
    assert waited["FF"].total == hidden["FF"].total + 2048


def test_parts_add_up_and_say_what_bounds_them():
    step = Sat().step(vit_small(), 4, WeightSparsity(2, 8))
    assert sum(step.by_part().values()) == pytest.approx(step.cycles)
    assert step.seconds == step.cycles / 200e6
    assert {each.dataflow for each in step.parts} >= {"OS", None}
    assert {each.bound for each in Sat(bandwidth=1.0).step(vit_small(), 4).parts} == {"memory"}
    assert {each.bound for each in Sat(**ROOMY).step(vit_small(), 4).parts} == {"compute"}


def test_the_first_layer_has_no_backward_product():
    parts = Sat().step([LayerShape("a", 8, 8, first=True), LayerShape("b", 8, 8)], 2).parts
    assert [(each.layer, each.part) for each in parts] == [
        *itertools.product("a", ("FF", "WU", "optimiser")),
        *itertools.product("b", ("FF", "BP", "WU", "optimiser")),
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sat(rows=0), "rows=0"),
        (lambda: Sat(adder_latency=-1), "adder_latency=-1"),
        (lambda: Sat(bandwidth=0.0), "bandwidth=0"),
        (lambda: Product(4, 6, 4, 1, 4), "k a multiple of m"),
        (lambda: Product(0, 4, 4), "at least 1"),
        (lambda: Sat().step([LayerShape("a", 8, 8)], 0), "batch=0"),
    ],
)
def test_what_cannot_be_built_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
