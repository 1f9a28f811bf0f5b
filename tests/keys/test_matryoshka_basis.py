"""Orthogonal bases: Cayley's map and its inverse, principal and random bases, and the store in their coordinates."""

from typing import Any

import pytest
import torch

from apportion.errors import InputError
from apportion.keys import ComposedMemory
from apportion.keys.matryoshka_basis import (
    cayley,
    cayley_inverse,
    principal_bases,
    random_bases,
    with_cayley_signs,
)
from apportion.keys.projected_store import HeadSpace, ProjectedStore
from apportion.models.key_memory import LayerFacts
from apportion.ops.attend import attend

WIDTH = 8
Make = Any


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bases(seed: int = 0) -> torch.Tensor:
    return random_bases((2, 2, WIDTH, WIDTH), torch.Generator().manual_seed(seed)).float()


def spaces(key_ranks: list[int], value_ranks: list[int], seed: int = 0) -> tuple[HeadSpace, HeadSpace]:
    both, means = bases(seed), draw(2, 2, WIDTH, seed=seed + 1)
    return HeadSpace(both[0], means[0], key_ranks), HeadSpace(both[1], means[1], value_ranks)


@pytest.mark.parametrize("width", [1, 2, 8, 64])
def test_cayley_is_orthogonal_with_determinant_1_and_its_inverse_gives_it_back(width: int) -> None:
    q = cayley(3 * draw(5, width, width))
    one = torch.eye(width)
    torch.testing.assert_close(q.mT @ q, one.expand_as(q), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(q), torch.ones(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(cayley(cayley_inverse(q)), q, rtol=0, atol=1e-4)
    assert cayley_inverse(q).triu().abs().max() == 0


def test_cayley_is_computed_in_float32_under_autocast() -> None:
    x = draw(WIDTH, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        q = cayley(x.bfloat16())
    assert q.dtype == torch.float32
    torch.testing.assert_close(q.T @ q, torch.eye(WIDTH), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "q",
    [
        -torch.eye(WIDTH),
        torch.eye(WIDTH).flip(0),
        torch.eye(WIDTH).roll(1, 0),
        torch.diag(torch.tensor([-1.0] + [1.0] * (WIDTH - 1))),
        torch.diag(torch.tensor([-1.0, -1.0] + [1.0] * (WIDTH - 2))),
    ],
    ids=["-I", "reversed", "shifted", "determinant -1", "-1 twice"],
)
def test_signs_make_any_basis_reachable_and_the_inverse_says_what_it_cannot_do(q: torch.Tensor) -> None:
    if float(torch.linalg.svdvals(q + torch.eye(WIDTH)).min()) < 1e-6:
        with pytest.raises(InputError, match=r"eigenvalue -1.*with_cayley_signs"):
            cayley_inverse(q)
    turned = with_cayley_signs(q)
    torch.testing.assert_close(turned.abs(), q.abs())
    torch.testing.assert_close(cayley(cayley_inverse(turned)), turned, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(turned), torch.tensor(1.0))


def test_signs_keep_all_drawn_bases_far_from_the_eigenvalue() -> None:
    q = random_bases((200, 64, 64), torch.Generator().manual_seed(0))
    assert float(torch.linalg.det(q).min()) > 0
    assert float(torch.linalg.svdvals(q + torch.eye(64)).min()) > 1e-3


def test_a_matrix_that_is_not_orthogonal_is_refused() -> None:
    with pytest.raises(InputError, match="not orthogonal"):
        cayley_inverse(2 * torch.eye(3))


def test_no_basis_reconstructs_better_than_the_principal_one() -> None:
    x = draw(500, WIDTH) @ draw(WIDTH, WIDTH, seed=1)
    x = x - x.mean(0)
    best = principal_bases((x.T @ x)[None])[0]
    drawn = random_bases((50, WIDTH, WIDTH), torch.Generator().manual_seed(2)).float()
    for rank in range(1, WIDTH):

        def lost(q: torch.Tensor, rank: int = rank) -> torch.Tensor:
            head = q[..., :rank]
            return (x - x @ head @ head.mT).square().sum((-2, -1))

        assert lost(best) <= lost(drawn).min()


def test_a_rank_is_a_prefix_of_every_larger_one(make_step: Make) -> None:
    step = make_step(6)
    small, large = (HeadSpace(bases()[0], draw(2, WIDTH), [rank] * 2) for rank in (3, 7))
    torch.testing.assert_close(small.project(step.keys), large.project(step.keys)[..., :3])


def test_packing_holds_no_padding_and_comes_back() -> None:
    space = HeadSpace(bases()[0], draw(2, WIDTH), [5, 2])
    coordinates = space.project(draw(2, 2, 6, WIDTH, seed=3))
    packed = space.pack(coordinates)
    assert packed.shape == (2, 6, 7)
    torch.testing.assert_close(space.unpack(packed), coordinates)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_with_all_coordinates_the_memory_is_dense_attention(
    make_step: Make, facts: LayerFacts, prompt: bool, padding: int, softcap: float | None
) -> None:
    from dataclasses import replace

    from apportion.keys.trace import part_of

    step = replace(make_step(9, padding=padding), softcap=softcap)
    memory = ComposedMemory(facts, ProjectedStore(*spaces([WIDTH] * 2, [WIDTH] * 2), project_prompt=prompt))
    out = torch.cat([memory.attend(part_of(step, *part)) for part in ((0, 5), (5, 6), (6, 9))], dim=2)
    exact = attend(step.queries, step.keys, step.values, step.scaling, softcap, step.real)
    torch.testing.assert_close(out[:, :, padding:], exact[:, :, padding:], rtol=1e-4, atol=1e-5)


def test_different_ranks_equal_a_loop_over_heads_with_the_means_written_out(make_step: Make, facts: LayerFacts) -> None:
    step = make_step(7)
    keys, values = spaces([3, 0], [2, 6])
    both, means = bases(), draw(2, 2, WIDTH, seed=1)
    out = ComposedMemory(facts, ProjectedStore(keys, values, project_prompt=True)).attend(step)
    for head in range(4):
        group = head // 2
        rk, rv = (both[0, group, :, : keys.ranks[group]], both[1, group, :, : values.ranks[group]])
        mu_k, mu_v = means[0, group], means[1, group]
        q, k, v = step.queries[:, head], step.keys[:, group], step.values[:, group]
        logits = ((q @ rk) @ ((k - mu_k) @ rk).mT + (q @ mu_k)[..., None]) * WIDTH**-0.5
        weights = logits.masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf).softmax(-1)
        expected = weights @ ((v - mu_v) @ rv) @ rv.T + mu_v
        torch.testing.assert_close(out[:, head], expected, rtol=1e-4, atol=1e-5)


def test_the_mean_of_the_keys_never_matters(make_step: Make, facts: LayerFacts) -> None:
    step, values = make_step(7), spaces([3, 5], [4, 4])[1]
    outs = []
    for mean in (torch.zeros(2, WIDTH), 5 * draw(2, WIDTH, seed=9)):
        store = ProjectedStore(HeadSpace(bases()[0], mean, [3, 5]), values, project_prompt=True)
        outs.append(ComposedMemory(facts, store).attend(step))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)


def test_no_rank_for_values_leaves_their_mean_and_none_for_keys_attends_evenly(
    make_step: Make, facts: LayerFacts
) -> None:
    step = make_step(5)
    keys, values = spaces([0, 0], [0, 0])
    out = ComposedMemory(facts, ProjectedStore(keys, values, project_prompt=True)).attend(step)
    torch.testing.assert_close(out[0, 0, 3], values.mean[0])
    whole = spaces([0, 0], [WIDTH] * 2)
    out = ComposedMemory(facts, ProjectedStore(*whole, project_prompt=True)).attend(step)
    torch.testing.assert_close(out[0, 3, 4], step.values[0, 1].mean(0), rtol=1e-4, atol=1e-5)


def test_bytes_are_those_of_the_ranks_and_exact_until_the_prompt_is_closed(make_step: Make, facts: LayerFacts) -> None:
    memory = ComposedMemory(facts, ProjectedStore(*spaces([3, 1], [8, 2])))
    memory.attend(make_step(10))
    assert memory.usage.share_held == 1
    memory.close()
    memory.attend(make_step(1, start=10))
    assert memory.store.bytes_held() == 2 * 11 * (3 + 1 + 8 + 2) * 4
    assert memory.usage.bytes_read == memory.store.bytes_held()
    assert memory.usage.share_held == 14 / 32
    memory.pick_rows(torch.tensor([1]))
    assert memory.store.read()[0].shape == (1, 2, 11, 3)
    chosen = torch.tensor([[[2, 5], [0, 1]]])
    keys, _ = memory.store.read(chosen)
    torch.testing.assert_close(keys[0, 0], memory.store.read()[0][0, 0, [2, 5]])


@pytest.mark.parametrize("ranks", [[9, 1], [-1, 2], [4]])
def test_impossible_ranks_are_refused(ranks: list[int]) -> None:
    with pytest.raises(InputError, match=r"ranks="):
        HeadSpace(bases()[0], draw(2, WIDTH), ranks)
