import pytest
import torch

from apportion.data.synthetic_heads import synthetic_heads
from apportion.errors import InputError


def test_switching_heads_keep_their_mean_and_shifting_heads_move_it() -> None:
    heads = synthetic_heads(0, prompts=4000)
    moved = (heads.positive.mean(0) - heads.negative.mean(0)).norm(dim=-1)
    assert moved[heads.switches].max() < 0.5
    assert moved[heads.others].max() < 0.5
    assert moved[heads.shifts].min() > 3
    assert (int(heads.switches.sum()), int(heads.shifts.sum()), int(heads.others.sum())) == (8, 8, 24)


def test_only_switching_heads_write_along_another_axis() -> None:
    heads = synthetic_heads(1, prompts=200)
    for head in range(40):
        axes = [
            torch.linalg.svd(each[:, 0, head] - each[:, 0, head].mean(0))[2][0]
            for each in (heads.positive, heads.negative)
        ]
        same = abs(float(axes[0] @ axes[1])) > 0.95
        assert same != bool(heads.switches[0, head])


def test_a_seed_gives_the_same_heads() -> None:
    assert torch.equal(synthetic_heads(2).positive, synthetic_heads(2).positive)
    assert not torch.equal(synthetic_heads(2).positive, synthetic_heads(3).positive)
    with pytest.raises(InputError, match="heads=16"):
        synthetic_heads(0, heads=16)
