"""Quantised codes: what is read back, what gradients see, what bytes hold."""

import pytest
import torch

from apportion.errors import InputError
from apportion.keys.quantising import CodeCache, Quantiser, ranges, straight_through
from apportion.ops.packing import pack_codes, unpack_codes

QUANTISERS = [Quantiser(bits, group) for bits in (2, 4, 8) for group in (8, None)]


@pytest.mark.parametrize("quantiser", QUANTISERS, ids=str)
def test_what_is_read_back_is_near_and_stays_what_it_is(quantiser: Quantiser) -> None:
    x = torch.randn(2, 24, 5, generator=torch.Generator().manual_seed(0))
    once = quantiser.fake(x)
    torch.testing.assert_close(quantiser.fake(once), once)
    grouped = x.unflatten(1, (-1, 8)) if quantiser.group else x
    scale, _ = ranges(grouped, quantiser.bits, dim=-2 if quantiser.group else -1)
    # Half a step for the code, and half a step for the zero point at the ends of the range.
    assert ((once.view_as(grouped) - grouped).abs() <= 1.001 * scale).all()
    assert (once - x).abs().mean() > 1e-4


@pytest.mark.parametrize("quantiser", QUANTISERS, ids=str)
def test_packed_bytes_are_the_same_numbers(quantiser: Quantiser) -> None:
    x = torch.randn(2, 24, 5, generator=torch.Generator().manual_seed(0))
    packed = quantiser.pack(x)
    assert packed[0].dtype == torch.uint8
    torch.testing.assert_close(quantiser.unpack(*packed, channels=5), quantiser.fake(x))


def test_codes_are_packed_several_to_a_byte() -> None:
    codes = torch.tensor([[1, 2, 15, 0, 7]], dtype=torch.uint8)
    packed = pack_codes(codes, 4)
    assert packed.tolist() == [[1 + 16 * 2, 15, 7]]
    assert unpack_codes(packed, 4, 5).tolist() == codes.tolist()


@pytest.mark.parametrize("constant", [0.0, 3.0, -2.0, 100.0])
def test_a_channel_that_never_changes_comes_back_as_it_is(constant: float) -> None:
    x = torch.full((1, 8, 3), constant)
    torch.testing.assert_close(Quantiser(4, 8).fake(x), x)
    torch.testing.assert_close(Quantiser(4).fake(x), x)


def test_gradients_go_through_where_nothing_is_clipped() -> None:
    scale, zero = torch.tensor([0.5]), torch.tensor([4.0])
    x = torch.tensor([-5.0, -1.9, 0.3, 5.1, 9.0], dtype=torch.float64, requires_grad=True)
    read = straight_through(x, scale, zero, 4)
    assert read.tolist() == [-2.0, -2.0, 0.5, 5.0, 5.5]
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * read**2).sum(), x)
    # Of the path without rounding, sum w z^2 taken at what was read: finite differences in z.
    step = 1e-6
    differences = weights * ((read + step) ** 2 - (read - step) ** 2) / (2 * step)
    expected = torch.where(torch.tensor([False, True, True, True, False]), differences, 0.0)
    torch.testing.assert_close(gradient, expected.detach())


@pytest.mark.parametrize("quantiser", [None, Quantiser(4, 8), Quantiser(4)], ids=str)
@pytest.mark.parametrize("first", [1, 8, 13])
def test_a_growing_cache_reads_as_if_all_had_come_at_once(quantiser: Quantiser | None, first: int) -> None:
    x = torch.randn(2, 21, 6, generator=torch.Generator().manual_seed(0))
    cache = CodeCache(quantiser)
    cache.append(x[:, :first])
    for token in range(first, 21):
        cache.append(x[:, token : token + 1])
    whole = 0 if quantiser is None else 21 - 21 % (quantiser.group or 1)
    expected = x.clone()
    if quantiser is not None:
        expected[:, :whole] = quantiser.fake(x[:, :whole])
    torch.testing.assert_close(cache.view, expected)
    cache.pick_rows(torch.tensor([1, 1, 0]))
    torch.testing.assert_close(cache.view, expected[[1, 1, 0]])


def test_bytes_are_those_of_packed_codes_scales_and_zero_points() -> None:
    x = torch.randn(1, 21, 6)
    grouped, by_token = CodeCache(Quantiser(4, 8)), CodeCache(Quantiser(4))
    grouped.append(x)
    by_token.append(x)
    assert grouped.bytes == 2 * 6 * (4 + 4 + 1) + 5 * 6 * 4
    assert by_token.bytes == 21 * (3 + 4 + 1)


def test_quantisers_that_cannot_work_are_refused() -> None:
    with pytest.raises(InputError, match="bits=3"):
        Quantiser(3)
    with pytest.raises(InputError, match="group=12"):
        Quantiser(4, 12)
    with pytest.raises(InputError, match="20 tokens"):
        Quantiser(4, 8).fake(torch.randn(1, 20, 3))
