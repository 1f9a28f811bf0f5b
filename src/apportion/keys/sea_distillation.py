"""What SEA learns from a dense teacher, and how its estimator is fitted to one layer of a pretrained decoder.

Training costs what dense attention costs: the teacher's table of all pairs is compared with the estimated one and with
the student's own. Only what comes after training is cheap.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, mse_loss

from apportion.errors import InputError
from apportion.keys.sea import SeaAttention, SeaOutput, SeaSettings
from apportion.keys.sea_lists import KeyLists, columns_of, row_lengths
from apportion.keys.trace import Trace, exact_weights, part_of
from apportion.models.key_memory import Step
from apportion.training import TrainingResult, TrainingSettings, train

KL_WEIGHT = 0.1


@dataclass(frozen=True, eq=False)
class SeaLosses:
    """Losses of one layer; their sum is the paper's.

    Attributes:
        estimate: of the estimated map against the teacher's attention: ``0.1 * KL + MSE``.
        scores: the same of the student's own dense attention, which keeps its queries and keys near the teacher's.
        context: mean squared difference of what the heads give.
    """

    estimate: Float[Tensor, ""]
    scores: Float[Tensor, ""]
    context: Float[Tensor, ""]

    @property
    def total(self) -> Float[Tensor, ""]:
        """All three."""
        return self.estimate + self.scores + self.context


def dense_attention(
    queries: Float[Tensor, "batch heads n d"],
    keys: Float[Tensor, "batch heads n d"],
    real: Bool[Tensor, "batch n"],
    causal: bool,
) -> Float[Tensor, "batch heads n n"]:
    """Attention weights of everything; zeros where nothing may be read."""
    seen = _seen(real, causal)
    logits = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    return logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1) * seen


def spread_estimate(
    estimate: Float[Tensor, "batch heads n columns"], real: Bool[Tensor, "batch n"], causal: bool
) -> Float[Tensor, "batch heads n n"]:
    """The estimated probability of every key: that of its column, scaled so that each query's sum is 1."""
    lengths, place = row_lengths(real, causal), (real.cumsum(1) - 1).clamp_min(0)
    column = columns_of(lengths, place[:, None].expand(-1, real.shape[1], -1), estimate.shape[-1])
    spread = estimate.gather(3, column[:, None].expand(-1, estimate.shape[1], -1, -1)) * _seen(real, causal)
    return spread / spread.sum(-1, keepdim=True).clamp_min(1e-30)


def table_loss(
    teacher: Float[Tensor, "batch heads n n"],
    student: Float[Tensor, "batch heads n n"],
    real: Bool[Tensor, "batch n"],
    causal: bool,
) -> Float[Tensor, ""]:
    """``0.1 * KL(teacher || student) + MSE``: the mean over queries, and over pairs that a query may read.

    Args:
        teacher: attention weights.
        student: attention weights, estimated or its own.
        real: False for padding.
        causal: whether a query may read later tokens.
    """
    pairs, heads = _seen(real, causal), teacher.shape[1]
    logs = student.clamp_min(1e-9).log()
    divergence = (teacher * (teacher.clamp_min(1e-9).log() - logs)).sum() / (real.sum() * heads)
    squares = ((student - teacher).square() * pairs).sum() / (pairs.sum() * heads)
    return KL_WEIGHT * divergence + squares


def attention_losses(
    output: SeaOutput,
    queries: Float[Tensor, "batch heads n d"],
    keys: Float[Tensor, "batch heads n d"],
    teacher: Float[Tensor, "batch heads n n"],
    teacher_context: Float[Tensor, "batch heads n d"],
    real: Bool[Tensor, "batch n"],
    causal: bool,
) -> SeaLosses:
    """The losses of one layer.

    Args:
        output: of the student's layer.
        queries: of the student.
        keys: of the student.
        teacher: attention weights of the teacher's layer.
        teacher_context: what the teacher's heads gave.
        real: False for padding.
        causal: as the layer is.
    """
    apart = (output.context - teacher_context).square() * real[:, None, :, None]
    own = dense_attention(queries, keys, real, causal)
    return SeaLosses(
        table_loss(teacher, spread_estimate(output.estimate, real, causal), real, causal),
        table_loss(teacher, own, real, causal),
        apart.sum() / (real.sum() * apart.shape[1] * apart.shape[3]),
    )


def model_loss(
    hidden: list[tuple[Tensor, Tensor]], logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None
) -> Float[Tensor, ""]:
    """What a whole student learns beside the losses of its layers, with the paper's weights.

    Args:
        hidden: hidden states of student and teacher, a pair a layer.
        logits: of the student, [..., vocabulary].
        teacher_logits: of the teacher.
        labels: what is right, of the logits' shape without the last dimension; None if nobody knows.
    """
    apart = torch.stack([mse_loss(student, teacher) for student, teacher in hidden]).mean()
    student, teacher = (each.flatten(0, -2).log_softmax(-1) for each in (logits, teacher_logits))
    loss = 5 * apart + 0.2 * kl_div(student, teacher, reduction="batchmean", log_target=True)
    return loss if labels is None else loss + 0.1 * cross_entropy(logits.flatten(0, -2), labels.flatten())


def mass_read(lists: KeyLists, weights: Float[Tensor, "batch heads n n"]) -> Float[Tensor, "batch heads"]:
    """Share of the exact attention weight that fell on keys that were read, as a mean over queries without padding."""
    return (weights * lists.mask()).sum(-1).mean(-1)


def fit_to_trace(
    trace: Trace,
    layer: int,
    settings: SeaSettings,
    training: TrainingSettings,
    *,
    tokens: int | None = None,
    progress: bool = False,
) -> tuple[SeaAttention, TrainingResult]:
    """Train the estimator of one layer of a pretrained decoder on a trace; the decoder stays as it is.

    Only the estimator's losses are used: there is no student whose queries, keys and output could change. It stands
    beside the decoder and is not tied to the door of key methods: it says which keys each query should read
    (`mass_on_trace`), and what exact attention over them gives.

    Args:
        trace: of some texts, see `record_trace`.
        layer: one of the trace's.
        settings: heads and their width must be the layer's, and ``length`` at least the texts'.
        training: one text a step.
        tokens: of each text, a part drawn anew at each step; None for all of it.
        progress: show it on stderr.

    Raises:
        InputError: the settings do not fit the layer.
    """
    facts = trace.facts[layer]
    if (settings.heads, settings.head_width) != (facts.heads, facts.width):
        raise InputError(
            f"heads={settings.heads}, head_width={settings.head_width}: layer {layer} has {facts.heads} heads of width "
            f"{facts.width}"
        )
    steps = trace.steps[layer]
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        sea = SeaAttention(settings)

    def draw(step: int) -> tuple[Tensor, ...]:
        whole = steps[step % len(steps)]
        length = min(whole.new, tokens or whole.new)
        generator = torch.Generator().manual_seed(training.seed * 1_000_003 + step)
        start = int(torch.randint(whole.new - length + 1, (), generator=generator))
        part = part_of(whole, start, start + length)
        return (*_by_head(part), exact_weights(part), part.real)

    def objective(module: SeaAttention, batch: tuple[Tensor, ...], step: int) -> tuple[Tensor, dict[str, float]]:
        queries, keys, values, exact, real = batch
        estimate = module(queries, keys, values, real).estimate
        return table_loss(exact, spread_estimate(estimate, real, settings.causal), real, settings.causal), {}

    result = train(sea, objective, draw, training, None, progress=progress)
    return sea.eval(), result


@torch.no_grad()
def mass_on_trace(sea: SeaAttention, step: Step, budget: int | None = None) -> tuple[float, float]:
    """Of one text of a trace: share of the exact attention weight on keys that are read, and keys read per query."""
    queries, keys, values = _by_head(step)
    output = sea.eval()(queries, keys, values, step.real, budget=budget)
    return float(mass_read(output.lists, exact_weights(step)).mean()), float(output.lists.counts().float().mean())


def _by_head(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (each.repeat_interleave(step.group, dim=1) for each in (step.keys, step.values))
    return step.queries, keys, values


def _seen(real: Tensor, causal: bool) -> Tensor:
    pairs = (real[:, :, None] & real[:, None, :])[:, None]
    return pairs & torch.ones_like(pairs).tril() if causal else pairs
