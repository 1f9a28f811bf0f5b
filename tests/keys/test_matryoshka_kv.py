"""MatryoshkaKV on tiny models: fitting, reading, folding, greedy ranks, saving."""

import itertools
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from apportion.errors import InputError
from apportion.keys import read_method, record_trace
from apportion.keys.matryoshka_basis import random_bases
from apportion.keys.matryoshka_kv import MatryoshkaKV
from apportion.keys.matryoshka_moments import head_moments
from apportion.keys.matryoshka_ranks import (
    attention_error_table,
    greedy_ranks,
    losses_by_attention,
    losses_by_divergence,
)
from apportion.keys.matryoshka_training import attention_errors, encode_rows, stored_in
from apportion.models import LanguageModel, load
from tiny_families import tiny_model

TEXTS = [topics["assignment"][:1500], topics["function"][:1500]]


class _Letters:
    """A tokenizer whose tokens are letters."""

    pad_token_id = 0

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[3 + ord(letter) % 90 for letter in text][:40]])}


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load(tiny_llama)


@pytest.fixture
def method(lm: LanguageModel) -> MatryoshkaKV:
    return MatryoshkaKV(share=0.5).fit(lm, TEXTS, tokens=100)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, 21), generator=torch.Generator().manual_seed(2))


def test_moments_are_those_of_the_cached_keys_and_values(lm: LanguageModel) -> None:
    layers, means, covariances = head_moments(lm, TEXTS, tokens=30)
    steps = record_trace(lm, TEXTS, tokens=30).steps[1]
    values = torch.cat([step.values[0, 1] for step in steps])
    row = layers.index(1)
    torch.testing.assert_close(means[row, 1, 1].float(), values.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(covariances[row, 1, 1].float(), values.T.cov(correction=0), rtol=1e-3, atol=1e-5)


def test_generated_tokens_count_too(lm: LanguageModel) -> None:
    text = lm.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"][:, :12]
    written = lm.model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=5, do_sample=False)
    _, means, _ = head_moments(lm, TEXTS[:1], tokens=12, generate=5)
    cached = lm.model(written[:, :16], use_cache=True).past_key_values.layers[0].keys[0]
    torch.testing.assert_close(means[0, 0].float(), cached.mean(1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi"])
@torch.no_grad()
def test_folding_changes_nothing_and_is_undone(family: str, ids: torch.Tensor) -> None:
    model = LanguageModel(family, tiny_model(family), _Letters())
    method = MatryoshkaKV(share=0.5, prompt="projected").fit(model, ["some letters to fit the bases to, and more"])
    ranks = torch.randint(1, 5, method.ranks().shape, generator=torch.Generator().manual_seed(0))
    method.set_ranks(ranks)
    dense = model.model(ids).logits
    found = []
    for fold in (False, True):
        method.fold = fold
        with method(model):
            cache = model.model(ids[:, :15], use_cache=True).past_key_values
            found.append(model.model(ids[:, 15:], past_key_values=cache).logits)
            if fold:
                shown = model.model(ids[:, :15], use_cache=False).logits
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(shown, dense[:, :15], atol=1e-3)
    assert torch.equal(model.model(ids).logits, dense)


@pytest.mark.parametrize("prompt", ["dense", "projected"])
@torch.no_grad()
def test_any_bases_and_means_give_the_model_at_full_rank(lm: LanguageModel, ids: torch.Tensor, prompt: str) -> None:
    method = MatryoshkaKV(share=1.0, prompt=prompt).fit(lm, TEXTS, tokens=50)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in method.fitted.items():
        is_basis = name.endswith("bases")
        method.fitted[name] = (
            random_bases(tensor.shape, generator).float()
            if is_basis
            else torch.randn(tensor.shape, generator=generator)
        )
    exact = lm.model(ids).logits
    with method(lm) as run:
        cache = lm.model(ids[:, :10], use_cache=True).past_key_values
        run.close_prompt()
        found = lm.model(ids[:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(found, exact[:, 10:], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_projected_prompt_in_chunks_is_one_pass_and_the_training_forward(
    lm: LanguageModel, method: MatryoshkaKV, ids: torch.Tensor
) -> None:
    method.prompt = "projected"
    with stored_in(lm, method.head_bases().spaces(method.ranks())):
        whole = lm.model(ids, use_cache=False).logits
    with method(lm) as run:
        cache, parts = None, []
        for part in ids.split(8, dim=1):
            out = lm.model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        assert run.usage.share_held == 0.5
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(whole, lm.model(ids).logits, atol=1e-2)


@torch.no_grad()
def test_one_basis_serves_all_ranks(lm: LanguageModel, method: MatryoshkaKV) -> None:
    method.set_ranks(torch.full(method.ranks().shape, 3))
    rows = encode_rows(lm, TEXTS, 40)
    exact = lm.model(rows).logits.log_softmax(-1)
    lost = []
    for share in (0.25, 0.5, 0.75, 1.0):
        with stored_in(lm, method.head_bases().spaces(method.at(share).ranks())):
            found = lm.model(rows, use_cache=False).logits.log_softmax(-1)
        lost.append(float(torch.nn.functional.kl_div(found, exact, log_target=True, reduction="sum")))
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 1e-2 * lost[0]
    assert method.at(0.5).ranks().unique().tolist() == [4]
    assert method.ranks().unique().tolist() == [3]


# --- greedy ranks ----------------------------------------------------------------------------------------------------


def separable(shape: tuple[int, int, int], width: int, step: int) -> tuple[torch.Tensor, Any]:
    """Convex errors of each entry by how many steps it has lost."""
    growth = torch.rand(*shape, width // step, generator=torch.Generator().manual_seed(0)).sort(-1).values
    lost = torch.nn.functional.pad(growth.cumsum(-1), (1, 0))

    def errors(ranks: torch.Tensor) -> torch.Tensor:
        now = (width - ranks) // step
        return lost.gather(-1, (now[..., None] + 1).clamp_max(width // step))[..., 0] - lost.gather(
            -1, now[..., None]
        ).squeeze(-1)

    return lost, errors


@pytest.mark.parametrize("share", [0.25, 0.5, 0.7])
def test_greedy_finds_the_best_of_all_allocations_where_losses_add_up(share: float) -> None:
    shape, width, step = (2, 2, 2), 4, 2
    lost, errors = separable(shape, width, step)
    ranks = greedy_ranks(errors, shape, width, share, step=step)
    mean = float(ranks.float().mean()) / width
    assert share - step / width / ranks.numel() < mean <= share
    best = min(
        sum(float(each[place]) for each, place in zip(lost.view(-1, 3), combination, strict=True))
        for combination in itertools.product(range(3), repeat=8)
        if 1 - sum(combination) * step / width / 8 <= share
    )
    own = float(lost.gather(-1, ((width - ranks) // step)[..., None]).sum())
    assert own == pytest.approx(best)


def test_greedy_never_gives_back_keeps_its_floor_and_takes_several_at_once() -> None:
    shape, seen = (3, 2, 2), []
    _, errors = separable(shape, 8, 1)

    def watched(ranks: torch.Tensor) -> torch.Tensor:
        seen.append(ranks.clone())
        return errors(ranks)

    ranks = greedy_ranks(watched, shape, 8, 0.5, step=1, floor=3)
    assert all((after <= before).all() for before, after in itertools.pairwise([*seen, ranks]))
    assert len(seen) == 48
    assert int(ranks.min()) == 3
    assert float(ranks.float().mean()) == 4
    seen.clear()
    greedy_ranks(watched, shape, 8, 0.5, step=1, floor=3, at_once=5)
    assert len(seen) == 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"step": 3}, "step=3 does not divide 8"),
        ({"step": 2, "floor": 3}, "floor=3"),
        ({"step": 2, "floor": 6}, "share=0.5"),
        ({"step": 2, "at_once": 0}, "at_once=0"),
    ],
)
def test_impossible_allocations_are_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        greedy_ranks(lambda ranks: ranks.float(), (1, 2, 2), 8, 0.5, **options)


def test_the_table_of_attention_errors_is_what_the_store_loses(lm: LanguageModel, method: MatryoshkaKV) -> None:
    trace = record_trace(lm, TEXTS, tokens=40)
    bases = method.head_bases()
    table = attention_error_table(trace, bases, 2)
    ranks = torch.tensor([[[2, 8], [4, 0]], [[6, 4], [2, 2]], [[0, 8], [8, 6]]])
    direct = attention_errors(trace, bases.spaces(ranks))
    for row, layer in enumerate(bases.layers):
        parts = [table[row, group, ranks[row, 0, group] // 2, ranks[row, 1, group] // 2] for group in range(2)]
        assert float(sum(parts)) == pytest.approx(direct[layer], rel=1e-3)
    grown = losses_by_attention(trace, bases, 2)(ranks)
    fewer = ranks.clone()
    fewer[1, 0, 0] -= 2
    change = attention_errors(trace, bases.spaces(fewer))[1] - direct[1]
    assert float(grown[1, 0, 0]) == pytest.approx(change, rel=1e-2, abs=1e-6)


@torch.no_grad()
def test_the_papers_errors_are_divergences_with_one_entry_cut(lm: LanguageModel, method: MatryoshkaKV) -> None:
    rows = encode_rows(lm, TEXTS, 30)
    bases = method.head_bases()
    ranks = torch.full(bases.shape, 8)
    ranks[0, 0, 0] = 1
    errors = losses_by_divergence(lm, bases, rows, 2)(ranks)
    assert errors[0, 0, 0] == torch.inf
    ranks[2, 1, 1] -= 2
    with stored_in(lm, bases.spaces(ranks)):
        cut = lm.model(rows, use_cache=False).logits.log_softmax(-1)
    exact = lm.model(rows, use_cache=False).logits.log_softmax(-1)
    assert float(errors[2, 1, 1]) == pytest.approx(float((exact.exp() * (exact - cut)).sum(-1).mean()), rel=1e-3)


@pytest.mark.parametrize("by", ["attention", "divergence"])
def test_ranks_of_their_own_keep_the_budget(lm: LanguageModel, method: MatryoshkaKV, by: Any) -> None:
    method.allocate(lm, TEXTS, 0.75, by=by, step=4, at_once=3, tokens=24)
    ranks = method.ranks()
    assert float(ranks.float().mean()) == 6
    assert len(ranks.unique()) > 1
    with method(lm) as run:
        lm.model.generate(encode_rows(lm, TEXTS, 20)[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert run.usage.share_held == 0.75


# --- the method as a thing to keep -----------------------------------------------------------------------------------


def test_it_comes_back_from_disk_with_its_ranks(lm: LanguageModel, method: MatryoshkaKV, tmp_path: Path) -> None:
    method.allocate(lm, TEXTS, 0.6, by="attention", step=2, tokens=30)
    method.save(tmp_path)
    loaded = read_method(tmp_path)
    assert isinstance(loaded, MatryoshkaKV)
    assert loaded.share == 0.6
    assert torch.equal(loaded.ranks(), method.ranks())
    with loaded(lm):
        pass


def test_settings_and_texts_that_cannot_work_are_refused(lm: LanguageModel, method: MatryoshkaKV) -> None:
    for options, said in (
        ({"share": 0.0}, "share=0.0"),
        ({"prompt": "some"}, "prompt='some'"),
        ({"fold": True}, "fold=True needs"),
    ):
        with pytest.raises(InputError, match=said):
            MatryoshkaKV(**options)
    with pytest.raises(InputError, match="texts is empty"):
        MatryoshkaKV().fit(lm, [])
    with pytest.raises(InputError, match="text 1 has"):
        MatryoshkaKV().fit(lm, [TEXTS[0], ""])
    with pytest.raises(InputError, match="not fitted"):
        MatryoshkaKV().distil(lm, TEXTS)
    with pytest.raises(InputError, match="no text is that long"):
        method.distil(lm, ["short"])
    with pytest.raises(InputError, match="step=3"):
        method.allocate(lm, TEXTS, step=3)
    with pytest.raises(InputError, match="for which nothing was fitted"), method(tiny_model("qwen3")):
        tiny_model("qwen3")(torch.tensor([[3, 4]]))
