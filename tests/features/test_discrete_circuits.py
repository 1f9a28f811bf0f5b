import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apportion.data.tasks import Prompt, PromptPairs
from apportion.errors import InputError
from apportion.features.discrete_circuits import (
    NULL,
    CodeBook,
    CodeSettings,
    HeadCodes,
    code_loss,
    code_loss_gradients_,
    edge_scores,
    find_circuit,
    fit_codes,
    k_means_codes,
    node_scores,
    nodes_from_edges,
    softmax_per_layer,
    training_rows,
    written_on_prompts,
)
from apportion.models import load, tokenise

TINY = CodeSettings(n_features=6, epochs=20, training_prompts=4)


def random_codes(prompts: int = 20, heads: int = 6, n_features: int = 5, seed: int = 0) -> HeadCodes:
    generator = torch.Generator().manual_seed(seed)
    positive, negative = (
        torch.randint(NULL, n_features, (prompts, heads), generator=generator) for _ in range(2)
    )  # fmt: skip
    return HeadCodes(positive, negative, n_features)


def written(prompts: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(prompts, 2, 3, 8, generator=torch.Generator().manual_seed(seed))


def test_a_perfect_dictionary_costs_its_l1_norm_and_nothing_else() -> None:
    book = CodeBook(4, CodeSettings(n_features=4, penalty=0.5))
    with torch.no_grad():
        book.encoder_weight.copy_(torch.eye(4))
        book.decoder_weight.copy_(torch.eye(4))
    x = torch.rand(7, 4)
    assert code_loss(book, x).item() == pytest.approx(0.5 * float(x.sum(1).mean()))


@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("silent", [False, True])
def test_the_sparing_gradients_are_those_of_the_loss(penalty: float, silent: bool) -> None:
    torch.manual_seed(0)
    book = CodeBook(8, CodeSettings(n_features=5, penalty=penalty))
    with torch.no_grad():
        book.encoder_bias.copy_(torch.tensor([0.1, -9.0, -0.5, 0.0, -1.0]) - (20.0 if silent else 0.0))
        book.bias.normal_()
    x = torch.randn(11, 8)
    code_loss(book, x).backward()
    expected = {name: each.grad.clone() for name, each in book.named_parameters() if each.grad is not None}
    code_loss_gradients_(book, x)
    for name, each in book.named_parameters():
        torch.testing.assert_close(each.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("decoder_norm", "axis"), [("vectors", 1), ("official", 0)])
def test_weights_keep_unit_norm_and_gradients_have_nothing_along_them(decoder_norm: str, axis: int) -> None:
    book = CodeBook(8, replace(TINY, decoder_norm=decoder_norm))  # type: ignore[arg-type]
    torch.testing.assert_close(book.decoder_weight.norm(dim=axis), torch.ones(book.decoder_weight.shape[1 - axis]))
    torch.testing.assert_close(book.encoder_weight.norm(dim=1), torch.ones(6))
    code_loss_gradients_(book, torch.randn(9, 8))
    book.project_gradients_()
    assert book.decoder_weight.grad is not None
    assert (book.decoder_weight.grad * book.decoder_weight).sum(axis).abs().max() < 1e-6


def test_training_lowers_the_loss_and_repeats_itself() -> None:
    positive, negative = written(seed=1), written(seed=2)
    rows = training_rows(positive, negative, TINY)
    assert rows.shape == (4 * 6, 8)
    before = code_loss(CodeBook(8, TINY), rows).item()
    codes, notes = fit_codes(positive, negative, replace(TINY, epochs=200))
    assert notes["fvu"] < before / float(rows.var(0).mean())
    again, _ = fit_codes(positive, negative, replace(TINY, epochs=200))
    assert torch.equal(codes.positive, again.positive)
    assert 0 <= notes["null"] <= 1


def test_training_prompts_are_half_of_each_kind() -> None:
    positive, negative = torch.zeros(30, 1, 1, 2), torch.ones(30, 1, 1, 2)
    for seed in range(5):
        rows = training_rows(positive, negative, CodeSettings(training_prompts=10, seed=seed))
        assert rows.mean() == 0.5


def test_a_row_without_a_feature_has_the_null_code_and_never_code_zero() -> None:
    book = CodeBook(4, CodeSettings(n_features=3))
    with torch.no_grad():
        book.encoder_bias.fill_(-100.0)
    assert (book.codes(torch.randn(5, 2, 4)) == NULL).all()
    with torch.no_grad():
        book.encoder_bias[2] = 100.0
    assert (book.codes(torch.randn(5, 2, 4)) == 2).all()


def test_node_scores_are_those_of_sets() -> None:
    codes = random_codes()
    for head in range(6):
        used = set(codes.positive[:, head].tolist()) - {NULL}
        also = set(codes.negative[:, head].tolist()) - {NULL}
        assert node_scores(codes)[head] == len(used - also)
        assert node_scores(codes, "normalised")[head] == pytest.approx(len(used - also) / len(used | also))
        distance = sum(
            abs(codes.positive[:, head].tolist().count(c) / 20 - codes.negative[:, head].tolist().count(c) / 20)
            for c in range(NULL, 5)
        )
        assert float(node_scores(codes, "tv")[head]) == pytest.approx(distance / 2)


@pytest.mark.parametrize("normalised", [False, True])
def test_edge_scores_are_those_of_sets_of_pairs(normalised: bool) -> None:
    codes = random_codes(seed=3)
    edges = edge_scores(codes, normalised=normalised)
    for one, two in itertools.product(range(6), repeat=2):
        seen = [
            {(a, b) for a, b in each[:, [one, two]].tolist() if NULL not in (a, b)}
            for each in (codes.positive, codes.negative)
        ]
        expected = 0.0 if one == two else float(len(seen[0] - seen[1]))
        if normalised:
            expected /= len(seen[0] | seen[1])
        assert float(edges[one, two]) == pytest.approx(expected)
    assert torch.equal(edges, edges.T)
    causal = edge_scores(codes, layer_of=torch.tensor([0, 0, 1, 1, 2, 2]))
    assert causal.tril().abs().sum() == 0
    assert causal[0, 1] == 0
    assert torch.equal(causal[0, 2:], edge_scores(codes)[0, 2:])


def test_scores_do_not_care_how_features_are_numbered_nor_how_prompts_are_ordered_or_repeated() -> None:
    codes = random_codes(seed=4)
    numbers = torch.randperm(5)
    renamed = HeadCodes(
        *(torch.where(each == NULL, NULL, numbers[each]) for each in (codes.positive, codes.negative)), 5
    )
    shuffled = replace(codes, positive=codes.positive[torch.randperm(20)])
    repeated = replace(codes, positive=torch.cat([codes.positive, codes.positive]))
    for other in (renamed, shuffled, repeated):
        for score in ("raw", "normalised", "tv"):
            torch.testing.assert_close(node_scores(codes, score), node_scores(other, score))  # type: ignore[arg-type]
        assert torch.equal(edge_scores(codes), edge_scores(other))


def test_scores_at_their_limits() -> None:
    codes = random_codes(seed=5)
    same = replace(codes, negative=codes.positive)
    for score in ("raw", "normalised", "tv"):
        assert node_scores(same, score).abs().max() == 0  # type: ignore[arg-type]
    assert edge_scores(same).abs().max() == 0
    without = replace(codes, negative=codes.negative[:0])
    sizes = [len(set(codes.positive[:, head].tolist()) - {NULL}) for head in range(6)]
    assert node_scores(without).tolist() == sizes
    single = HeadCodes(torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int64), 1)
    assert node_scores(single).tolist() == [0, 0]


def test_nodes_from_edges_counts_the_ends_of_the_best_edges() -> None:
    edges = torch.tensor([[0.0, 5.0, 1.0], [5.0, 0.0, 2.0], [1.0, 2.0, 0.0]])
    assert nodes_from_edges(edges, 4).tolist() == [2, 2, 0]
    assert nodes_from_edges(edges, 8).tolist() == [2, 4, 2]
    assert nodes_from_edges(edges).sum() == 4


def test_a_softmax_per_layer_changes_the_order_between_layers() -> None:
    scores = torch.tensor([[3.0, 3.0], [2.0, 0.0]])
    assert softmax_per_layer(scores)[1, 0] > softmax_per_layer(scores)[0, 0]


def test_heads_that_switch_axes_are_found_although_their_means_are_equal() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(axis: int) -> torch.Tensor:
        """Head 0 writes along +- this axis, head 1 along +- axis 0."""
        sign = torch.randint(0, 2, (40, 1, 2, 1), generator=generator) * 2.0 - 1
        directions = torch.zeros(1, 1, 2, 8)
        directions[0, 0, 0, axis], directions[0, 0, 1, 0] = 1.0, 1.0
        return sign * directions + 0.05 * torch.randn(40, 1, 2, 8, generator=generator)

    positive, negative = draw(1), draw(0)
    settings = CodeSettings(n_features=16, penalty=0.01, training_prompts=20, learning_rate=3e-3)
    codes, _ = fit_codes(positive, negative, settings)
    assert node_scores(codes)[0] > node_scores(codes)[1]
    assert node_scores(k_means_codes(positive, negative, settings), "tv").argmax() == 0


@pytest.mark.parametrize("center", [None, "per_head"])
@pytest.mark.parametrize("normalize", ["global", "per_head"])
def test_scaling_makes_codes_blind_to_the_units_of_the_model(center: str | None, normalize: str) -> None:
    settings = replace(TINY, center=center, normalize=normalize)  # type: ignore[arg-type]
    positive, negative = written(seed=1), written(seed=2)
    codes, _ = fit_codes(positive, negative, settings)
    larger, _ = fit_codes(positive * 64, negative * 64, settings)
    assert torch.equal(codes.positive, larger.positive)
    if center and normalize == "per_head":
        factors = 2.0 ** torch.arange(6).view(2, 3, 1)
        unequal, _ = fit_codes(positive * factors + 16, negative * factors + 16, settings)
        assert float((unequal.positive == codes.positive).float().mean()) > 0.9


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: CodeSettings(n_features=0), "n_features is 0"),
        (lambda: CodeSettings(penalty=-1.0), "penalty -1.0"),
        (lambda: CodeSettings(training_prompts=1), "training_prompts is 1"),
        (lambda: fit_codes(written(3), written(3), CodeSettings(training_prompts=10)), "3 positive"),
        (lambda: fit_codes(written(1), written(1)), "at least 2"),
        (lambda: fit_codes(written() * float("nan"), written()), "not all finite"),
    ],
)
def test_what_cannot_be_is_refused(call: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        call()  # type: ignore[operator]


def test_padding_is_no_part_of_a_mean_and_every_head_of_a_model_is_scored(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    texts = [("11", "22"), ("345", "346"), ("77", "78"), ("123", "423")]
    clean, other = (
        tuple(Prompt(pair[side], ("7",), ("9",)) for pair in texts) for side in (0, 1)
    )  # fmt: skip
    task = PromptPairs("digits", clean, other)
    pairs = tokenise(task, model)
    alone = tokenise(task.select(0, 1), model)
    for position in ("mean", "end"):
        torch.testing.assert_close(
            written_on_prompts(model, pairs.clean, position)[:1], written_on_prompts(model, alone.clean, position)
        )
    found = find_circuit(model, task, TINY, score="tv")
    assert found.scores.shape == (model.n_layers, model.n_heads)
    assert found.seconds > 0
    assert torch.equal(found.scores, find_circuit(model, pairs, TINY, score="tv").scores)
    assert not torch.equal(found.scores, find_circuit(model, pairs, TINY, score="tv", per_layer=True).scores)
    with pytest.raises(InputError, match="position 'verb'"):
        find_circuit(model, task, TINY, position="verb")
