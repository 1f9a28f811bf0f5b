"""CSKV: codes of keys and values, their factors, and the window of exact tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.errors import InputError
from apportion.keys import ComposedMemory, KeyBudget, read_method
from apportion.keys.compressed_store import CompressedStore, Window
from apportion.keys.cskv import CSKV
from apportion.keys.low_rank import (
    Factors,
    at_random,
    biases_of,
    from_weights,
    joint_parts,
    measure_moments,
    principal,
    rank_of,
    relative_error,
)
from apportion.keys.quantising import CodeCache, Quantiser
from apportion.keys.reconstruction import Reconstruction, pieces_of
from apportion.keys.selectors import Oracle
from apportion.keys.trace import encode_texts, part_of, watch_steps
from apportion.models import LanguageModel, load
from apportion.models.key_memory import LayerFacts, Step
from apportion.models.key_projections import key_projections
from apportion.ops.attend import reference
from biased_models import biased_model
from tiny_families import tiny_model

TEXTS = ["one two three four five six seven eight nine ten " * 3, "a b c d e f g h i j k l m n o p q r s t u v " * 3]
Make = Callable[..., CompressedStore]


@pytest.fixture
def lm(tiny_llama: Path) -> LanguageModel:
    return load(tiny_llama)


@pytest.fixture
def make_store() -> Make:
    """Stores of a layer with 2 key-value heads of width 8, codes of 6 numbers."""

    def make(
        window: int = 4, kind: str = "sliding", *, rank: int = 6, bias: float = 0.5, quantisers: Any = (None, None)
    ) -> CompressedStore:
        factors = {part: at_random(rank, torch.full((16,), bias), seed) for seed, part in enumerate(("keys", "values"))}
        codes = {part: CodeCache(each) for part, each in zip(("keys", "values"), quantisers, strict=True)}
        return CompressedStore(factors, codes, Window(window, kind), layers=1)

    return make


def _expected(store: CompressedStore, step: Step, exact: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a step, all but the newest of them through their codes, each by its definition."""
    parts = {}
    for part, x in joint_parts(step).items():
        factors = store.factors[part]
        rebuilt = (x - factors.bias) @ factors.down @ factors.up + factors.bias
        parts[part] = rebuilt.unflatten(-1, (2, 8)).transpose(1, 2)
    old = torch.arange(step.new) < step.new - exact
    keys = torch.where(old[:, None], step.rotation.apply(parts["keys"]), step.keys)
    return keys, torch.where(old[:, None], parts["values"], step.values)


@pytest.mark.parametrize(
    ("window", "kind"), [(0, "sliding"), (4, "sliding"), (4, "blocks"), (0, "blocks"), (40, "sliding")]
)
@pytest.mark.parametrize("padding", [0, 3])
def test_every_token_is_read_exactly_once_exact_or_rebuilt(
    make_step: Any, make_store: Make, facts: LayerFacts, window: int, kind: str, padding: int
) -> None:
    step, store = make_step(19, padding=padding), make_store(window, kind)
    memory = ComposedMemory(facts, store)
    prompt = memory.attend(part_of(step, 0, 7))
    whole = part_of(step, 0, 7)
    seen = (torch.arange(7) <= torch.arange(7)[:, None]) & whole.real[:, None, None]
    dense = reference.attend(whole.queries, whole.keys, whole.values, seen, step.scaling, None)
    torch.testing.assert_close(prompt, dense, rtol=1e-5, atol=1e-6)
    memory.close()
    assert store.exact == {"sliding": min(window, 7), "blocks": 7 % window if window else 0}[kind]
    for place in range(7, 19):
        found = memory.attend(part_of(step, place, place + 1))
        so_far = part_of(step, 0, place + 1)
        wanted = {"sliding": min(max(window, 1), place + 1), "blocks": place % window + 1 if window else 1}[kind]
        assert store.exact == wanted
        keys, values = _expected(store, so_far, wanted)
        exact = reference.attend(
            step.queries[:, :, place : place + 1], keys, values, so_far.real[:, None, None], step.scaling, None
        )
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sliding", "blocks"])
def test_a_turn_of_several_tokens_reads_itself_exactly(
    make_step: Any, make_store: Make, facts: LayerFacts, kind: str
) -> None:
    step, store = make_step(20), make_store(4, kind)
    memory = ComposedMemory(facts, store)
    memory.attend(part_of(step, 0, 9))
    memory.close()
    found = memory.attend(part_of(step, 9, 16))
    exact = 7 if kind == "sliding" else 9 % 4 + 7
    assert store.exact == exact
    so_far = part_of(step, 0, 16)
    keys, values = _expected(store, so_far, exact)
    seen = (torch.arange(16) <= torch.arange(9, 16)[:, None])[None, None]
    expected = reference.attend(step.queries[:, :, 9:16], keys, values, seen, step.scaling, None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    memory.attend(part_of(step, 16, 17))
    assert store.exact == (4 if kind == "sliding" else 1)


def test_some_tokens_are_read_as_all_are(make_step: Any, make_store: Make) -> None:
    for window in (0, 4):
        store = make_store(window)
        store.append(make_step(12))
        store.close()
        keys, values = store.read()
        tokens = torch.tensor([[[0, 9, 11], [3, 4, 8]], [[1, 2, 10], [5, 6, 11]]])
        some_keys, some_values = store.read(tokens)
        for row in range(2):
            for head in range(2):
                torch.testing.assert_close(some_keys[row, head], keys[row, head, tokens[row, head]])
                torch.testing.assert_close(some_values[row, head], values[row, head, tokens[row, head]])


def test_a_selector_can_choose_among_codes(make_step: Any, make_store: Make, facts: LayerFacts) -> None:
    step = make_step(12)
    dense, chosen = (
        ComposedMemory(facts, make_store(3), selector) for selector in (None, Oracle(KeyBudget(share=1.0), "mean"))
    )
    outs = []
    for memory in (dense, chosen):
        memory.attend(part_of(step, 0, 10))
        memory.close()
        outs.append(torch.cat([memory.attend(part_of(step, place, place + 1)) for place in (10, 11)], dim=2))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)


def test_keys_are_rebuilt_at_any_positions(make_step: Any, make_store: Make) -> None:
    step, store = make_step(9, start=1234), make_store(0, rank=16)
    store.append(step)
    store.close()
    keys, values = store.read()
    torch.testing.assert_close(keys, step.keys, rtol=1e-4, atol=1e-5)
    store.window = Window(4)
    torch.testing.assert_close(
        store.outputs(values.repeat_interleave(2, dim=1)), step.values.repeat_interleave(2, dim=1), rtol=1e-4, atol=1e-5
    )


def test_bytes_are_codes_and_the_window(make_step: Any, make_store: Make, facts: LayerFacts) -> None:
    store = make_store(4)
    memory = ComposedMemory(facts, store)
    memory.attend(make_step(20))
    memory.close()
    rotations = 20 * 2 * 4 * 4
    assert store.bytes_held() == 2 * 4 * ((6 + 6) * 20 + 4 * 2 * 16) + rotations
    memory.attend(make_step(1, start=20))
    rotations = 21 * 2 * 4 * 4
    assert memory.usage.bytes_held == 2 * 4 * ((6 + 6) * 21 + 4 * 2 * 16) + rotations
    assert memory.usage.bytes_read == 2 * 4 * ((6 + 6) * 17 + 4 * 2 * 16)
    store.pick_rows(torch.tensor([1]))
    assert store.bytes_held() == 4 * ((6 + 6) * 21 + 4 * 2 * 16) + rotations


def test_rows_are_picked_everywhere(make_step: Any, make_store: Make) -> None:
    quantised = (Quantiser(4, 8), Quantiser(4))
    for quantisers in ((None, None), quantised):
        store = make_store(3, quantisers=quantisers)
        store.append(make_step(20))
        store.close()
        before = store.read()
        rows = torch.tensor([1, 0, 1])
        store.pick_rows(rows)
        for found, old in zip(store.read(), before, strict=True):
            torch.testing.assert_close(found, old[rows])


@pytest.mark.parametrize("init", ["exact", "svd", "asvd", "random"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "opt_350m"])
@torch.no_grad()
def test_at_full_density_any_factors_are_dense_attention(family: str, init: str) -> None:
    """With biases that are not zero."""
    model = biased_model(family, torch.float32)
    lm = LanguageModel(family, model, None)
    ids = torch.randint(3, 97, (1, 20), generator=torch.Generator().manual_seed(2))
    method = CSKV(key_density=1.0, value_density=1.0, window=3, init=init)
    projections = key_projections(model)
    method.take(method.initial_factors(lm, projections, measure_moments(lm, [ids[0]], projections)), lm)
    dense = model(ids).logits
    with method(lm) as run:
        parts = [model(ids[:, :12]).logits]
        for place in range(12, 20):
            parts.append(model(ids[:, place : place + 1], past_key_values=run.cache).logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), dense, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_prompt_is_exact_and_what_follows_reads_codes(lm: LanguageModel) -> None:
    method = CSKV(key_density=0.25, value_density=0.25, window=2).fit(lm, TEXTS)
    ids = lm.tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    exact = lm.model(ids).logits
    with method(lm) as run:
        prompt = lm.model(ids[:, :-4])
        torch.testing.assert_close(prompt.logits, exact[:, :-4], rtol=1e-4, atol=1e-4)
        later = lm.model(ids[:, -4:-3], past_key_values=prompt.past_key_values).logits
    assert (later - exact[:, -4:-3]).abs().max() > 1e-2
    assert run.usage.share_held < 0.45


def test_the_closed_form_loses_what_the_smallest_singular_values_hold_and_less_than_all_others(
    lm: LanguageModel,
) -> None:
    texts = encode_texts(lm, TEXTS, 60)
    projections = key_projections(lm)
    moments = measure_moments(lm, texts, projections)
    kept: dict[int, list[Step]] = {0: [], 1: [], 2: []}
    watch_steps(lm, texts, lambda layer, step: kept[layer].append(step))
    for layer, steps in kept.items():
        for part in ("keys", "values"):
            matrix = torch.cat([joint_parts(step)[part][0] for step in steps])
            second, projection = moments[layer].second[part], getattr(projections[layer], part)
            closed = principal(second, 6, torch.zeros(16))
            lost = (matrix - closed.decode(closed.encode(matrix, None))).norm() / matrix.norm()
            sizes = torch.linalg.svdvals(matrix)
            assert float(lost) == pytest.approx(float(sizes[6:].norm() / sizes.norm()), rel=1e-4)
            assert relative_error(closed, second) == pytest.approx(float(lost), rel=1e-4)
            others = [
                from_weights(projection, 6),
                from_weights(projection, 6, moments[layer].hidden ** 0.5),
                at_random(6, torch.zeros(16), 0),
                principal(second, 6, torch.zeros(16), blocks=2),
            ]
            assert all(relative_error(each, second) > relative_error(closed, second) for each in others)


def test_factors_of_weights_are_those_of_the_paper(lm: LanguageModel) -> None:
    moments = measure_moments(lm, encode_texts(lm, TEXTS, 60), key_projections(lm))
    projection = key_projections(lm)[1].keys
    scale = moments[1].hidden ** 0.5
    for s in (torch.ones(32), scale):
        left, sizes, right = torch.linalg.svd(s[:, None] * projection.weight, full_matrices=False)
        a = (left[:, :6] * sizes[:6].sqrt()) / s[:, None]
        b = sizes[:6].sqrt()[:, None] * right[:6]
        found = from_weights(projection, 6, s)
        torch.testing.assert_close(projection.weight @ found.down @ found.up, a @ b, rtol=1e-3, atol=1e-4)
        # Up to the signs of singular vectors.
        torch.testing.assert_close(found.up.abs(), b.abs(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close((projection.weight @ found.down).abs(), a.abs(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_training_goes_towards_the_closed_form_and_never_below_it(lm: LanguageModel, tmp_path: Path) -> None:
    training = Reconstruction(learning_rate=3e-3, length=48, steps=60)
    options: dict[str, Any] = {"key_density": 0.25, "value_density": 0.5, "window": 2}
    untrained = CSKV(**options, init="svd").fit(lm, TEXTS)
    trained = CSKV(**options, init="svd", training=training).fit(lm, TEXTS, progress=False)
    paused = CSKV(**options, init="svd", training=training)
    paused.fit(lm, TEXTS, folder=tmp_path / "run", progress=False, stop_after=25)
    assert not torch.equal(paused.fitted["layer.0.keys.up"], trained.fitted["layer.0.keys.up"])
    paused.fit(lm, TEXTS, folder=tmp_path / "run", progress=False)
    for name, tensor in trained.fitted.items():
        assert torch.equal(paused.fitted[name], tensor), name
    closed = CSKV(**options).fit(lm, TEXTS)
    pieces = pieces_of(encode_texts(lm, TEXTS, 4096), 48)
    errors = [_loss(each, lm, pieces) for each in (untrained, trained, closed)]
    assert errors[0] > errors[1] * 1.1
    assert errors[1] > errors[2]
    trained.save(tmp_path / "kept")
    again = read_method(tmp_path / "kept")
    assert again.training == training
    with again(lm):
        again_text = lm.generate("one two three four", tokens=8)
    with trained(lm):
        assert lm.generate("one two three four", tokens=8) == again_text
    with pytest.raises(InputError, match="another"):
        CSKV(**options, init="asvd", training=training).fit(lm, TEXTS, folder=tmp_path / "run", progress=False)


def _loss(method: CSKV, lm: LanguageModel, pieces: list[torch.Tensor]) -> float:
    losses = []

    def show(layer: int, step: Step) -> None:
        for part, x in joint_parts(step).items():
            factors = Factors.of_layer(method.of_layer(layer), part)
            losses.append(float((factors.decode(factors.encode(x, step.hidden)) - x).square().mean()))

    watch_steps(lm, pieces, show)
    return sum(losses)


@pytest.mark.slow
def test_training_through_quantisation_sees_codes_as_they_are_read_back(lm: LanguageModel) -> None:
    options: dict[str, Any] = {"key_density": 0.5, "value_density": 0.5, "init": "svd", "bits": 2, "group": 8}
    training = {
        which: Reconstruction(learning_rate=3e-3, length=48, steps=40, quantised=which) for which in (True, False)
    }
    through, plain = (
        CSKV(**options, training=training[which]).fit(lm, TEXTS, progress=False) for which in (True, False)
    )
    assert not torch.equal(through.fitted["layer.0.keys.up"], plain.fitted["layer.0.keys.up"])
    pieces = pieces_of(encode_texts(lm, TEXTS, 4096), 48)
    untrained = CSKV(**options).fit(lm, TEXTS)
    assert _read_back_loss(through, lm, pieces) < 0.9 * _read_back_loss(untrained, lm, pieces)


def _read_back_loss(method: CSKV, lm: LanguageModel, pieces: list[torch.Tensor]) -> float:
    losses = []

    def show(layer: int, step: Step) -> None:
        for part, x in joint_parts(step).items():
            factors = Factors.of_layer(method.of_layer(layer), part)
            quantiser = Quantiser(method.bits, method.group if part == "keys" else None)
            codes = quantiser.fake(factors.encode(x, step.hidden))
            losses.append(float((factors.decode(codes) - x).square().mean()))

    watch_steps(lm, pieces, show)
    return sum(losses)


def test_normed_keys_are_coded_as_they_are_and_have_no_factors_of_weights() -> None:
    model = tiny_model("qwen3")
    lm = LanguageModel("qwen3", model, None)
    ids = torch.randint(3, 97, (30,), generator=torch.Generator().manual_seed(2))
    projections = key_projections(model)
    moments = measure_moments(lm, [ids], projections)
    factors = CSKV().initial_factors(lm, projections, moments)
    assert factors[0]["keys"].rank == 2 * 3
    assert biases_of(projections[0], {"keys": 24, "values": 24})["keys"].abs().max() == 0
    for init in ("svd", "asvd"):
        with pytest.raises(InputError, match="norms its keys"):
            CSKV(init=init).initial_factors(lm, projections, moments)


def test_ranks_are_whole_numbers_for_each_head() -> None:
    assert rank_of(0.2, 64, 3, "key_density") == 36
    assert rank_of(0.29, 100, 1, "key_density") == 29
    assert rank_of(1.0, 64, 3, "key_density") == 192
    with pytest.raises(InputError, match=r"key_density=0.01: .* at least 0.0156"):
        rank_of(0.01, 64, 3, "key_density")


def test_bad_input_is_refused(lm: LanguageModel, make_step: Any, make_store: Make) -> None:
    for given, message in (
        ({"key_density": 0.0}, "key_density=0.0"),
        ({"value_density": 1.5}, "value_density=1.5"),
        ({"window": -1}, "window=-1"),
        ({"window_kind": "round"}, "window_kind='round'"),
        ({"init": "magic"}, "init='magic'"),
        ({"bits": 5}, "bits=5"),
    ):
        with pytest.raises(InputError, match=message):
            CSKV(**given)
    with pytest.raises(InputError, match=r"key_density=0\.05"):
        CSKV(key_density=0.05).fit(lm, TEXTS)
    with pytest.raises(InputError, match="texts is empty"):
        CSKV().fit(lm, [])
    with pytest.raises(InputError, match="length=500"):
        CSKV(training=Reconstruction(length=500)).fit(lm, TEXTS)
    with pytest.raises(InputError, match=r"length=40.*group=32"):
        CSKV(training=Reconstruction(length=40), bits=4).fit(lm, TEXTS)
    for wrong in ({"length": 0}, {"epochs": 0}, {"steps": 0}):
        with pytest.raises(InputError, match="at least 1"):
            Reconstruction(**wrong)
    with pytest.raises(InputError, match="not fitted"), CSKV()(lm):
        pass
    trained = Factors(torch.zeros(32, 6), torch.zeros(6, 16), torch.zeros(16), from_hidden=True)
    with pytest.raises(InputError, match="hidden is None"):
        trained.encode(torch.zeros(1, 3, 16), None)
