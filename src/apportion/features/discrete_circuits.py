"""Integer codes on head outputs find the heads of a circuit (O'Neill and Bui 2024, arXiv 2405.12522).

Each (prompt, head) gets one code: the feature, out of F, that a small sparse autoencoder shared by all heads activates
most. A head belongs to the circuit to the extent that it uses codes on prompts with the task which it never uses on
prompts without: the k best of all heads are allocated to it. Nothing is ablated and no gradient goes through the model.

| paper and official code | here |
|---|---|
| z W_O^h, averaged over positions | ``written_on_prompts``: what each head writes, [prompts, layers, heads, d] |
| f = ReLU(W_enc (x - b) + b_enc), x-hat = f W_dec + b | ``CodeBook.encode``, ``CodeBook.decode`` |
| mean of (x-hat - x)^2 over rows *and* coordinates + lambda * mean L1 | ``code_loss``; ``CodeSettings.penalty`` |
| argmax of f; no feature at all | ``CodeBook.codes``; -1 (``NULL``) |
| P_h without N_h, normalised by their union | ``node_scores(codes, "raw")``, ``"normalised"`` |
| pairs of codes of two heads | ``edge_scores``; the published edge-level ROC is ``nodes_from_edges`` |

Ours, where the official code errs or has nothing: rows on which no feature fires have the null code rather than code 0,
and silence is no code in the sets (it is a bin of the histograms); the decoder's rows have unit norm
(``decoder_norm="official"`` normalises each output coordinate over features, as that code does, which lets L1 be
cheated); training prompts are drawn as many from both kinds; the frequency-aware score ``"tv"``; centring and scaling.

Scores are statistics of sets: they grow with the number of prompts. Compare heads within one run, with as many
positives as negatives, and look at what a high score means with `apportion.models.keep_heads`: a head that merely
reads the difference scores as high as one that the answer rests on.
"""

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion.data.tasks import PromptPairs
from apportion.errors import InputError
from apportion.features.head_scores import HeadScores
from apportion.models.heads import head_outputs, written_by_heads
from apportion.models.language import LanguageModel
from apportion.models.prompts import TokenPairs, TokenPrompts, tokenise

NULL = -1
NodeScore = Literal["raw", "normalised", "tv"]
_PROMPTS_AT_ONCE = 32


@dataclass(frozen=True)
class CodeSettings:
    """How codes are learned; the defaults are the paper's for IOI and greater-than (docstring: ``penalty=0.05``).

    Attributes:
        n_features: F, the number of codes.
        penalty: lambda, the weight of the L1 norm against the squared error *per coordinate*.
        epochs: of full-batch Adam.
        learning_rate: of Adam.
        training_prompts: how many of all prompts the autoencoder is fitted on, half of each kind.
        decoder_norm: ``vectors``: unit rows; ``official``: unit columns, as the official code has it.
        center: ``per_head`` takes each head's mean over all prompts away first, so that no feature is spent on which
            head is speaking.
        normalize: ``global`` divides all outputs by one number so that a coordinate is about 1 in size, which makes a
            penalty mean the same for other models; ``per_head`` does so for each head.
        seed: of the draw of training prompts and of the initial directions.

    Raises:
        InputError: a number out of range.
    """

    n_features: int = 200
    penalty: float = 0.02
    epochs: int = 500
    learning_rate: float = 1e-3
    training_prompts: int = 10
    decoder_norm: Literal["vectors", "official"] = "vectors"
    center: Literal["per_head"] | None = None
    normalize: Literal["global", "per_head"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("n_features", 1), ("epochs", 0), ("training_prompts", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if self.penalty < 0 or self.learning_rate <= 0:
            raise InputError(
                f"penalty {self.penalty}, learning_rate {self.learning_rate}: a penalty is 0 or more, a rate above 0"
            )


@dataclass(frozen=True, eq=False)
class HeadCodes:
    """One code for every (prompt, head), heads flattened in the order of layers; -1 where no feature fires.

    Attributes:
        positive, negative: the codes.
        n_features: codes run from 0 to below this.
    """

    positive: Int[Tensor, "positives heads"]
    negative: Int[Tensor, "negatives heads"]
    n_features: int

    @property
    def null_share(self) -> float:
        """The share of (prompt, head) without a code."""
        return float((torch.cat([self.positive, self.negative]) == NULL).float().mean())


class CodeBook(nn.Module):
    """The autoencoder that all heads share; untrained it is the random dictionary of the baselines.

    Args:
        width: of what heads write.
        settings: how it is learned.
    """

    def __init__(self, width: int, settings: CodeSettings) -> None:
        super().__init__()
        self.settings = settings
        generator = torch.Generator().manual_seed(settings.seed)
        bound = width**-0.5
        shape = (settings.n_features, width)
        self.encoder_weight = nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * bound)
        self.decoder_weight = nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * bound)
        self.encoder_bias = nn.Parameter(torch.zeros(settings.n_features))
        self.bias = nn.Parameter(torch.zeros(width))
        self.normalise_()

    def encode(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows features"]:
        """How much of each feature is in a row."""
        return torch.relu((x - self.bias) @ self.encoder_weight.T + self.encoder_bias)

    def decode(self, features: Float[Tensor, "rows features"]) -> Float[Tensor, "rows d"]:
        """The reconstruction."""
        return features @ self.decoder_weight + self.bias

    @torch.no_grad()
    def codes(self, x: Float[Tensor, "*rows d"]) -> Int[Tensor, "*rows"]:
        """The feature that is most active in each row, or -1 where none is."""
        features = self.encode(x.flatten(0, -2))
        best = features.max(dim=1)
        return best.indices.masked_fill(best.values <= 0, NULL).view(x.shape[:-1])

    @torch.no_grad()
    def normalise_(self) -> None:
        """Bring the weights back to unit norm."""
        for weight, axis in self._normed():
            weight.div_(weight.norm(dim=axis, keepdim=True).clamp(min=1e-12))

    @torch.no_grad()
    def project_gradients_(self) -> None:
        """Take out the part of the gradients that would only change norms."""
        for weight, axis in self._normed():
            if weight.grad is not None:
                weight.grad.sub_((weight.grad * weight).sum(axis, keepdim=True) * weight)

    def _normed(self) -> tuple[tuple[nn.Parameter, int], ...]:
        return (self.encoder_weight, 1), (self.decoder_weight, 0 if self.settings.decoder_norm == "official" else 1)


def code_loss(book: CodeBook, x: Float[Tensor, "rows d"]) -> Float[Tensor, ""]:
    """The loss of section 2.3 of the method sheet: squared error per coordinate plus L1; the reference."""
    features = book.encode(x)
    error = (book.decode(features) - x).square().mean()
    return error + book.settings.penalty * features.sum(1).mean()


@torch.no_grad()
def code_loss_gradients_(book: CodeBook, x: Float[Tensor, "rows d"]) -> None:
    """Set the gradients of ``code_loss``; exact, at the price of the rows and features at work.

    Most rows end up without a feature and many features without a row. Only the first product, which finds out, is
    taken over all of them; a row without a feature is reconstructed by the bias, and only the sum of such rows counts.
    """
    rows, width = x.shape
    scores = torch.addmm(book.encoder_bias - book.encoder_weight @ book.bias, x, book.encoder_weight.T)
    active = scores > 0
    speaking, used = active.any(1).nonzero().flatten(), active.any(0).nonzero().flatten()
    own = x if len(speaking) == rows else x[speaking]
    features = scores[speaking][:, used].relu_()
    decoder = book.decoder_weight[used]
    error = torch.addmm(book.bias, features, decoder).sub_(own)

    scale = 2 / (rows * width)
    to_features = torch.mm(error, decoder.T).mul_(scale).add_(book.settings.penalty / rows).mul_(features > 0)
    per_feature = to_features.sum(0)
    gradients = [torch.zeros_like(each) for each in (book.encoder_weight, book.decoder_weight, book.encoder_bias)]
    gradients[0][used] = to_features.T @ own - per_feature[:, None] * book.bias
    gradients[1][used] = scale * (features.T @ error)
    gradients[2][used] = per_feature
    book.encoder_weight.grad, book.decoder_weight.grad, book.encoder_bias.grad = gradients
    silent = (rows - len(speaking)) * book.bias - (x.sum(0) - own.sum(0))
    # The bias is added to the output, and taken away before the encoder.
    book.bias.grad = scale * (error.sum(0) + silent) - per_feature @ book.encoder_weight[used]


def fit_codes(
    positive: Float[Tensor, "positives layers heads d"],
    negative: Float[Tensor, "negatives layers heads d"],
    settings: CodeSettings | None = None,
) -> tuple[HeadCodes, dict[str, float]]:
    """Learn codes on a few prompts and give every prompt its codes.

    Args:
        positive: what each head writes on prompts with the task.
        negative: and on prompts without.
        settings: of the codes; ``epochs=0`` leaves the dictionary random.

    Returns:
        The codes, and figures about the dictionary on its training rows: ``l0``, ``fvu``, ``null`` (the share of all
        rows without a code).

    Raises:
        InputError: fewer prompts than the settings train on, or outputs that are not finite.
    """
    settings = settings or CodeSettings()
    positive, negative = prepared(positive, negative, settings)
    rows = training_rows(positive, negative, settings)
    book = CodeBook(rows.shape[1], settings).to(rows.device)
    optimizer = torch.optim.Adam(book.parameters(), lr=settings.learning_rate)
    for _ in range(settings.epochs):
        code_loss_gradients_(book, rows)
        book.project_gradients_()
        optimizer.step()
        book.normalise_()
    codes = HeadCodes(book.codes(positive).flatten(1), book.codes(negative).flatten(1), settings.n_features)
    with torch.no_grad():
        features = book.encode(rows)
        unexplained = (book.decode(features) - rows).square().sum() / (rows - rows.mean(0)).square().sum()
    notes = {"l0": float((features > 0).sum(1).float().mean()), "fvu": float(unexplained), "null": codes.null_share}
    return codes, notes


def k_means_codes(
    positive: Float[Tensor, "positives layers heads d"],
    negative: Float[Tensor, "negatives layers heads d"],
    settings: CodeSettings | None = None,
) -> HeadCodes:
    """The baseline with as many codes: the nearest of F centroids, fitted on the same rows as the autoencoder.

    Raises:
        InputError: as for `fit_codes`.
    """
    from sklearn.cluster import KMeans

    settings = settings or CodeSettings()
    positive, negative = prepared(positive, negative, settings)
    rows = training_rows(positive, negative, settings)
    clusters = KMeans(min(settings.n_features, len(rows)), n_init=1, random_state=settings.seed)
    centroids = torch.from_numpy(clusters.fit(rows.cpu().numpy()).cluster_centers_).to(rows)

    def nearest(x: Tensor) -> Tensor:
        return torch.cdist(x.flatten(0, -2), centroids).argmin(1).view(len(x), -1)

    return HeadCodes(nearest(positive), nearest(negative), settings.n_features)


def prepared(
    positive: Float[Tensor, "positives layers heads d"],
    negative: Float[Tensor, "negatives layers heads d"],
    settings: CodeSettings,
) -> tuple[Float[Tensor, "positives layers heads d"], Float[Tensor, "negatives layers heads d"]]:
    """Outputs centred and scaled as the settings ask.

    Raises:
        InputError: fewer than two prompts of a kind, or outputs that are not finite.
    """
    if min(len(positive), len(negative)) < 2:
        raise InputError(f"{len(positive)} positive and {len(negative)} negative prompts: give at least 2 of each")
    both = torch.cat([positive, negative])
    if not bool(both.isfinite().all()):
        raise InputError("head outputs are not all finite: use a wider dtype for the model, such as float32")
    if settings.center == "per_head":
        both = both - both.mean(0)
    if settings.normalize is not None:
        over = (0, 1, 2, 3) if settings.normalize == "global" else (0, 3)
        both = both / both.square().mean(over, keepdim=True).sqrt().clamp(min=1e-12)
    return both[: len(positive)], both[len(positive) :]


def training_rows(
    positive: Float[Tensor, "positives layers heads d"],
    negative: Float[Tensor, "negatives layers heads d"],
    settings: CodeSettings,
) -> Float[Tensor, "rows d"]:
    """All heads of the training prompts, half of which are of each kind (stratified; the official code draws from all).

    Raises:
        InputError: fewer prompts than the settings train on.
    """
    half = settings.training_prompts // 2
    counts = (settings.training_prompts - half, half)
    if counts[0] > len(positive) or counts[1] > len(negative):
        raise InputError(
            f"training_prompts is {settings.training_prompts}, half of each kind, but there are {len(positive)} "
            f"positive and {len(negative)} negative prompts"
        )
    generator = np.random.default_rng(settings.seed)
    drawn = [
        each[torch.from_numpy(generator.permutation(len(each))[:count]).to(each.device)]
        for each, count in zip((positive, negative), counts, strict=True)
    ]
    return torch.cat(drawn).flatten(0, 2)


def node_scores(codes: HeadCodes, score: NodeScore = "raw") -> Float[Tensor, " heads"]:
    """How much each head's codes tell positive prompts from negative ones.

    Args:
        codes: of all heads.
        score: ``raw``: the number of codes used on positives and never on negatives. ``normalised``: that, divided by
            the number of codes used at all. ``tv``: total variation between the two histograms of codes, silence
            included; it heeds how often a code is used, and does not grow with the number of prompts.
    """
    counts = [_counts(each, codes.n_features) for each in (codes.positive, codes.negative)]
    if score == "tv":
        shares = [each / each.sum(1, keepdim=True).clamp(min=1) for each in counts]
        return (shares[0] - shares[1]).abs().sum(1) / 2
    used, also = (each[:, :-1] > 0 for each in counts)
    unique = (used & ~also).sum(1).float()
    return unique if score == "raw" else unique / (used | also).sum(1).clamp(min=1)


def _counts(codes: Tensor, n_features: int) -> Tensor:
    """How often each head uses each code: [heads, features + 1], silence last."""
    place = codes.masked_fill(codes == NULL, n_features).T
    counts = torch.zeros(codes.shape[1], n_features + 1, device=codes.device)
    return counts.scatter_add_(1, place, torch.ones_like(place, dtype=counts.dtype))


def softmax_per_layer(scores: Float[Tensor, "layers heads"]) -> Float[Tensor, "layers heads"]:
    """The official code's option: a softmax within each layer, which (unlike one over all heads) changes the order."""
    return scores.softmax(1)


def edge_scores(
    codes: HeadCodes, *, layer_of: Int[Tensor, " heads"] | None = None, normalised: bool = False
) -> Float[Tensor, "heads heads"]:
    """For each pair of heads, how many pairs of their codes occur together on a positive prompt and on no negative one.

    Args:
        codes: of all heads.
        layer_of: the layer of each head; if given, only edges from a lower to a higher layer count.
        normalised: divide by the number of pairs of codes that occur at all.

    Returns:
        Symmetric without ``layer_of``; zeros on the diagonal. Pairs with silence are no pairs.
    """
    both = torch.cat([codes.positive, codes.negative])
    is_negative = (torch.arange(len(both), device=both.device) >= len(codes.positive)).long()[:, None]
    heads = both.shape[1]
    edges = torch.zeros(heads, heads, device=both.device)
    for head in range(heads):
        pair = (both[:, head, None] * (codes.n_features + 1) + both).masked_fill(
            (both == NULL) | (both[:, head, None] == NULL), NULL
        )
        # Sorted, the negatives of a pair come last: a pair whose last entry is positive is on no negative prompt.
        order = (pair * 2 + is_negative).sort(0).values
        pair, negative = order.div(2, rounding_mode="floor"), order % 2
        last = torch.ones_like(pair, dtype=torch.bool)
        last[:-1] = pair[1:] != pair[:-1]
        last &= pair >= 0
        edges[head] = (last & (negative == 0)).sum(0)
        if normalised:
            edges[head] /= last.sum(0).clamp(min=1)
    edges.fill_diagonal_(0)
    if layer_of is not None:
        edges = edges * (layer_of[:, None] < layer_of)
    return edges


def nodes_from_edges(edges: Float[Tensor, "heads heads"], k: int | None = None) -> Float[Tensor, " heads"]:
    """The paper's edge-level ranking of heads: how often a head appears among the ends of the best edges.

    Args:
        edges: of `edge_scores`; ties go by index.
        k: how many ends are looked at, two an edge; None takes half the number of pairs.
    """
    heads = edges.shape[0]
    k = heads * heads // 2 if k is None else k
    pairs = (~torch.eye(heads, dtype=torch.bool, device=edges.device)).nonzero()
    order = edges[pairs[:, 0], pairs[:, 1]].sort(descending=True, stable=True).indices
    ends = pairs[order].flatten()[:k]
    return torch.bincount(ends, minlength=heads).float()


@torch.no_grad()
def written_on_prompts(
    model: LanguageModel, prompts: TokenPrompts, position: str = "mean"
) -> Float[Tensor, "prompts layers heads d"]:
    """What each head writes to the residual stream on each prompt, at one position or on average.

    Args:
        model: a language model.
        prompts: to read.
        position: ``mean`` over all tokens (padding is left out), or a role such as ``end``, the last token.

    Raises:
        InputError: an unknown role.
    """
    if position != "mean" and position not in prompts.positions:
        raise InputError(f"position {position!r} is unknown: choose mean, or a role: {', '.join(prompts.positions)}")
    written = []
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        part = prompts.select(slice(start, start + _PROMPTS_AT_ONCE))
        outputs = head_outputs(model, part.input_ids, part.attention_mask).float()
        if position == "mean":
            weight = part.attention_mask[:, :, None, None, None].float()
            reduced = (outputs * weight).sum(1) / weight.sum(1)
        else:
            reduced = outputs[torch.arange(len(part), device=outputs.device), part.positions[position]]
        written.append(written_by_heads(model, reduced))
    return torch.cat(written)


def find_circuit(
    model: LanguageModel,
    task: PromptPairs | TokenPairs,
    settings: CodeSettings | None = None,
    *,
    score: NodeScore = "raw",
    position: str = "mean",
    per_layer: bool = False,
) -> HeadScores:
    """Score all heads of a model for a task, by codes.

    Args:
        model: a language model.
        task: prompts with and without what the answer rests on.
        settings: of the codes.
        score: as for `node_scores`.
        position: as for `written_on_prompts`.
        per_layer: rank by a softmax within each layer.

    Raises:
        InputError: as for what it calls.

    Examples:
        >>> from apportion.data.tasks import ioi
        >>> from apportion.models import load
        >>> find_circuit(load("smollm2"), ioi(60, frame=1), score="tv").top(5)  # doctest: +SKIP
    """
    started = time.perf_counter()
    pairs = task if isinstance(task, TokenPairs) else tokenise(task, model)
    positive, negative = (written_on_prompts(model, each, position) for each in (pairs.clean, pairs.counterfactual))
    codes, notes = fit_codes(positive, negative, settings)
    scores = node_scores(codes, score).view(model.n_layers, model.n_heads)
    if per_layer:
        scores = softmax_per_layer(scores)
    return HeadScores(f"codes, {score}", scores, time.perf_counter() - started, notes)
