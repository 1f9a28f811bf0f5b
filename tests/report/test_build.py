"""From a dictionary and a view to the data of a report."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from apportion.report import build_report, error_by_difficulty, token_texts, write_report


class FakeView:
    """Contexts of Gaussian activations."""

    def __init__(self, n_contexts: int = 30, length: int = 12, d_in: int = 6) -> None:
        generator = torch.Generator().manual_seed(0)
        self.n_contexts = n_contexts
        self.token_ids = torch.randint(0, 40, (n_contexts, length), generator=generator)
        self.activations = torch.randn(n_contexts, length, d_in, generator=generator)

    def contexts(self, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        part = slice(start, stop)
        ids = self.token_ids[part]
        return ids, self.activations[part], torch.ones(ids.shape, dtype=torch.bool), torch.arange(start, stop)


class FakeDictionary:
    """Two rectified features for every coordinate: a perfect reconstruction."""

    def __init__(self, d_in: int = 6) -> None:
        self.decoder_weight = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
        self.n_features = 2 * d_in
        self.strength = 1.0

    def encode(self, x: torch.Tensor) -> SimpleNamespace:
        codes = torch.relu(x @ self.decoder_weight.T)
        rows, columns = codes.nonzero(as_tuple=True)
        return SimpleNamespace(row_indices=lambda: rows, col_indices=columns, values=codes[rows, columns], dense=codes)

    def decode(self, codes: SimpleNamespace) -> torch.Tensor:
        return self.strength * codes.dense @ self.decoder_weight


def test_a_report_is_built_and_written(tmp_path):
    asked = []

    def decode_tokens(ids):
        asked.extend(ids)
        return [f" t{token}" for token in ids]

    data = build_report(
        FakeDictionary(),
        FakeView(),
        title="Fake",
        decode_tokens=decode_tokens,
        lm_unembedding=torch.randn(50, 6),
        final_norm_weight=torch.ones(6),
        progress=False,
        top=3,
    )
    assert data.contexts.top == 3
    assert data.nearest.indices.shape == (12, 8)
    assert sorted(asked) == sorted(set(asked)), "every token is decoded once"
    assert set(data.lens.promoted_ids.reshape(-1).tolist()) <= set(data.token_text)
    assert write_report(tmp_path / "r.html", data).stat().st_size > 10_000


def test_without_an_unembedding_there_is_no_lens():
    data = build_report(
        FakeDictionary(), FakeView(), title="x", decode_tokens=lambda ids: list(map(str, ids)), progress=False
    )
    assert data.lens is None
    assert data.error_by_difficulty is not None


def test_a_decoder_that_loses_tokens_is_refused():
    with pytest.raises(ValueError, match="decode_tokens gave 1 texts"):
        build_report(FakeDictionary(), FakeView(), title="x", decode_tokens=lambda ids: ["a"], progress=False)


def test_error_by_difficulty_averages_to_the_unexplained_variance():
    sae, view = FakeDictionary(), FakeView()
    sae.strength = 0.5
    found = error_by_difficulty(sae, view, contexts=30, groups=10)
    x = view.activations.reshape(-1, 6)
    expected = (x / 2).square().sum() / (x - x.mean(0)).square().sum()
    assert np.mean(found.error) == pytest.approx(float(expected), rel=1e-4)
    assert (np.diff(found.error) > 0).all(), "halving leaves more behind of what is further away"
    np.testing.assert_allclose(found.winners, 6)


def test_too_few_tokens_have_no_difficulty_groups():
    assert error_by_difficulty(FakeDictionary(), FakeView(n_contexts=1), groups=10) is None


def test_a_transcoder_has_no_error_of_its_own_input():
    sae = FakeDictionary()
    sae.decoder_weight = torch.zeros(12, 9)
    assert error_by_difficulty(sae, FakeView()) is None


def test_byte_level_tokens_keep_spaces_and_spell_partial_characters(tiny_llama):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer("if x:\n    é", add_special_tokens=False).input_ids
    texts = token_texts(tokenizer)(ids)
    assert "".join(texts).startswith("if x:\n    ")
    assert texts[-2:] == ["⟨C3⟩", "⟨A9⟩"]
    assert token_texts(tokenizer)([tokenizer.eos_token_id]) == ["<|end|>"]


@pytest.mark.parametrize(
    ("vocabulary", "piece", "expected"),
    [
        ({"##ing": 0, "cat": 1}, "##ing", "ing"),
        ({"##ing": 0, "cat": 1}, "cat", " cat"),
        ({"▁the": 0}, "▁the", " the"),
        ({"▁the": 0, "<0xE2>": 1}, "<0xE2>", "⟨E2⟩"),
        ({"▁the": 0, "<0x0A>": 1}, "<0x0A>", "\n"),
        ({"Ġthe": 0, "Ġcat": 1, "##": 2}, "Ġthe", " the"),
        ({"Ġthe": 0, "Ġcat": 1, "##": 2}, "##", "##"),
        ({"a": 0}, None, "⟨token 0⟩"),
    ],
)
def test_other_tokenizers_keep_their_spaces(vocabulary, piece, expected):
    tokenizer = SimpleNamespace(
        all_special_ids=[], get_vocab=lambda: vocabulary, convert_ids_to_tokens=lambda ids: [piece for _ in ids]
    )
    assert token_texts(tokenizer)([0]) == [expected]
