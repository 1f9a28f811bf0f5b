"""The quantised cache: codes are right to half a step, packed as many to a byte as they say, and read in any order."""

from typing import Any

import pytest
import torch

from apportion.errors import InputError
from apportion.keys.quantized import QuantizedKeys, QuantizedStore, dequantize, quantize
from apportion.keys.trace import part_of
from apportion.models.key_memory import LayerFacts


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("of_keys", [True, False])
@pytest.mark.parametrize("width", [8, 12, 6])
def test_numbers_come_back_to_half_a_step(bits: int, of_keys: bool, width: int) -> None:
    numbers = torch.randn(2, 3, 8, width, generator=torch.Generator().manual_seed(0)) * 3 - 1
    group = 4
    codes, scales, least = quantize(numbers, bits, group, of_keys)
    assert codes.dtype == torch.uint8
    assert codes.shape[-1] == -(-width * bits // 8)
    rows = scales.repeat_interleave(group, dim=2) if of_keys else scales
    lows = least.repeat_interleave(group, dim=2) if of_keys else least
    back = dequantize(codes, rows, lows, bits, width, numbers.dtype)
    step = rows.float().repeat_interleave(width // rows.shape[-1], dim=-1)
    # Half a step, and what rounding scale and least to 16 bits adds.
    assert ((back - numbers).abs() <= 0.5 * step + 0.01 * step.clamp_min(1)).all()
    # Keys share a range along tokens, values along channels: the written-out range is the group's.
    expected = (
        (numbers[:, :, :group].amax(2) - numbers[:, :, :group].amin(2))
        if of_keys
        else (numbers[..., : width // rows.shape[-1]].amax(-1) - numbers[..., : width // rows.shape[-1]].amin(-1))
    )
    found = scales[:, :, 0] if of_keys else scales[..., 0]
    torch.testing.assert_close(found.float() * (2**bits - 1), expected, rtol=0.01, atol=0.01)


def test_equal_numbers_and_16_bit_models() -> None:
    same = torch.full((1, 1, 4, 4), 3.0, dtype=torch.bfloat16)
    codes, scales, least = quantize(same, 2, 4, True)
    assert scales.dtype == torch.bfloat16
    back = dequantize(codes, scales.expand(1, 1, 4, 4), least.expand(1, 1, 4, 4), 2, 4, torch.bfloat16)
    torch.testing.assert_close(back, same)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_older_tokens_are_packed_and_the_newest_exact(make_step: Any, facts: LayerFacts, bits: int) -> None:
    step = make_step(30)
    memory = QuantizedKeys(bits, group=4, residual=6).memory(facts)
    exact = memory.attend(part_of(step, 0, 21))
    assert memory.store.packed == 0
    memory.close()
    store = memory.store
    assert isinstance(store, QuantizedStore)
    assert store.packed == 12  # 15 are older than the 6 newest: three whole groups
    assert exact.shape[2] == 21
    for place in range(21, 30):
        memory.attend(part_of(step, place, place + 1))
    assert (store.packed, store.length) == (24, 30)
    keys, values = store.read()
    torch.testing.assert_close(keys[:, :, 24:], step.keys[:, :, 24:])
    error = (keys - step.keys).abs().max()
    assert 0 < error < {2: 1.5, 4: 0.3, 8: 0.02}[bits]
    assert (values - step.values).abs().max() < {2: 1.5, 4: 0.3, 8: 0.02}[bits]
    # Codes, scales and least numbers of 2 rows and 2 heads of width 8, and 6 exact tokens in 4 bytes a number.
    of_keys = 24 * 8 * bits // 8 + 24 // 4 * 8 * 2 * 2
    of_values = 24 * 8 * bits // 8 + 24 * 2 * 2 * 2
    assert memory.usage.bytes_held == 4 * (of_keys + of_values + 2 * 6 * 8 * 4)
    some = torch.tensor([[[29, 0, 13, 25], [3, 24, 23, 7]]]).expand(2, 2, 4)
    picked, picked_values = store.read(some)
    index = some[..., None].expand(-1, -1, -1, 8)
    torch.testing.assert_close(picked, keys.gather(2, index))
    torch.testing.assert_close(picked_values, values.gather(2, index))
    store.pick_rows(torch.tensor([1]))
    torch.testing.assert_close(store.read()[0], keys[1:])


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(InputError, match="bits=3"):
        QuantizedKeys(bits=3)
    with pytest.raises(InputError, match="group=0"):
        QuantizedKeys(group=0)
