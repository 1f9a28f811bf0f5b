"""Wanda and SparseGPT written a second time, in float64, straight from what the papers ask for.

Nothing here is shared with the package: inputs come from hooks in transformers' own forward pass, ties and rounding
are spelt out, and SparseGPT solves by elimination (one column at a time the inverse second moments lose that column;
every row is moved at once; nothing waits) instead of with a Cholesky factor and lazy updates.

    PYTHONPATH=src python tests/support/straightforward_pruning.py --method wanda --method sparsegpt

prunes SmolLM2 both ways, for each of three choices of calibration windows, and prints a table of perplexities side by
side (on one thread, a seed takes Wanda one to two minutes, SparseGPT five). ``--jittered`` prints instead what the
straightforward way gives for weights that were changed by a millionth: how far roundings alone carry a perplexity.
"""

import argparse
import contextlib
import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = np.ndarray
DAMP, COLUMNS = 0.01, 128


def wanda(weight: Array, inputs: Array, sparsity: float) -> Array:
    """Of each row the weights with the smallest |w| times norm of the input go."""
    scores = np.abs(weight) * np.sqrt((inputs**2).sum(axis=0))
    kept = round((1 - sparsity) * weight.shape[1])
    pruned = np.zeros_like(weight)
    for row, score in enumerate(scores):
        best = np.argsort(-score, kind="stable")[:kept]
        pruned[row, best] = weight[row, best]
    return pruned


def wanda_groups(weight: Array, inputs: Array, n: int, m: int) -> Array:
    """The same for n of every m."""
    scores = np.abs(weight) * np.sqrt((inputs**2).sum(axis=0))
    pruned = np.zeros_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], m):
            best = start + np.argsort(-scores[row, start : start + m], kind="stable")[:n]
            pruned[row, best] = weight[row, best]
    return pruned


def sparsegpt(weight: Array, inputs: Array, sparsity: float, mask: Array | None = None, damp: float = DAMP) -> Array:
    """Optimal brain surgery, column by column; a mask can be given instead of chosen."""
    moments = inputs.T @ inputs / len(inputs)
    moments += damp * np.mean(np.diag(moments)) * np.eye(len(moments))
    # Tensors for the sake of their updates in place.
    inverse, weight = torch.from_numpy(np.linalg.inv(moments)), torch.from_numpy(weight.copy())
    rows, width = weight.shape
    chosen = torch.ones(rows, width, dtype=torch.bool) if mask is None else torch.from_numpy(mask)
    for column in range(width):
        if mask is None and column % COLUMNS == 0:
            part = slice(column, min(column + COLUMNS, width))
            # What each of these columns will cost once those before it are gone.
            costs = np.empty(part.stop - column)
            ahead = inverse[part, part].numpy().copy()
            for place in range(len(costs)):
                costs[place] = ahead[place, place]
                ahead -= np.outer(ahead[:, place], ahead[place]) / costs[place]
            scores = weight[:, part].numpy() ** 2 / costs
            kept = round((1 - sparsity) * scores.size)
            best = np.argsort(-scores, axis=None, kind="stable")[:kept]
            choice = np.zeros(scores.size, dtype=bool)
            choice[best] = True
            chosen[:, part] = torch.from_numpy(choice.reshape(scores.shape))
        later, pivot = slice(column, width), float(inverse[column, column])
        error = torch.where(chosen[:, column], 0, weight[:, column])
        weight[:, later].addr_(error, inverse[column, later].clone(), alpha=-1 / pivot)
        weight[~chosen[:, column], column] = 0
        inverse[later, later].addr_(inverse[later, column].clone(), inverse[column, later].clone(), alpha=-1 / pivot)
    return weight.numpy()


def least_squares(weight: Array, moments: Array, mask: Array) -> Array:
    """Each row's best weights on its mask, solved row by row: what no method can beat."""
    found = np.zeros_like(weight)
    for row in range(len(weight)):
        on = np.flatnonzero(mask[row])
        found[row, on] = np.linalg.solve(moments[np.ix_(on, on)], moments[on] @ weight[row])
    return found


def prune_in_place(model: Any, decoder: Any, ids: torch.Tensor, prune: Callable[[Array, Array], Array]) -> None:
    """Prune every linear layer of a transformers model, block by block.

    What reaches a block is found by transformers' own forward pass, of the model without the blocks before: these are
    pruned already, and what they put out takes the place of the embeddings.

    Args:
        model: the whole.
        decoder: the part of it that has the blocks as ``layers``.
        ids: calibration texts ``[texts, time]``.
        prune: of a weight ``[out, in]`` and what the layer reads ``[tokens, in]``.
    """
    blocks = decoder.layers
    streams: list[torch.Tensor | None] = [None] * len(ids)
    for place, block in enumerate(blocks):
        decoder.layers = blocks[place:]
        linears = {name: each for name, each in block.named_modules() if isinstance(each, torch.nn.Linear)}
        inputs = _inputs(model, block, linears, ids, streams)
        for name, linear in linears.items():
            pruned = prune(linear.weight.detach().double().numpy(), inputs[name])
            linear.weight.data.copy_(torch.from_numpy(pruned))
        streams = [_output(model, block, row, stream) for row, stream in zip(ids, streams, strict=True)]
    decoder.layers = blocks


class _Seen(Exception):
    """What was asked for has run."""


def _inputs(
    model: Any,
    block: Any,
    linears: Mapping[str, torch.nn.Linear],
    ids: torch.Tensor,
    streams: Sequence[torch.Tensor | None],
) -> dict[str, Array]:
    """What each linear layer of the first block reads."""
    found: dict[str, list[Array]] = {name: [] for name in linears}

    def keeper(name: str) -> Any:
        def keep(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            found[name].append(args[0].double().numpy().reshape(-1, args[0].shape[-1]))

        return keep

    handles = [each.register_forward_pre_hook(keeper(name)) for name, each in linears.items()]
    for row, stream in zip(ids, streams, strict=True):
        _output(model, block, row, stream)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(each) for name, each in found.items()}


@torch.no_grad()
def _output(model: Any, block: Any, row: torch.Tensor, stream: torch.Tensor | None) -> torch.Tensor:
    """What the first block puts out, given the stream in place of the embeddings (or those, if None)."""
    found: list[torch.Tensor] = []

    def replace(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args if stream is None else (stream, *args[1:])), options

    def keep(_: Any, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _Seen

    handles = [block.register_forward_pre_hook(replace, with_kwargs=True), block.register_forward_hook(keep)]
    with contextlib.suppress(_Seen):
        model(row.unsqueeze(0), use_cache=False)
    for handle in handles:
        handle.remove()
    return found[0]


def perplexity(model: Any, ids: torch.Tensor) -> float:
    """Of the model's own loss, row by row."""
    with torch.no_grad():
        losses = [float(model(row.unsqueeze(0), labels=row.unsqueeze(0), use_cache=False).loss) for row in ids]
    return float(np.exp(np.mean(losses)))


@dataclass(frozen=True)
class Compared:
    """A model pruned both ways on the same text.

    Attributes:
        method: ``wanda`` or ``sparsegpt``.
        seed: of the choice of calibration windows.
        dense, ours, straightforward: perplexities on held-out text.
        same_first, same_all: share of the weights of the first layer, and of all, that both prune or both keep.
    """

    method: str
    seed: int
    dense: float
    ours: float
    straightforward: float
    same_first: float
    same_all: float

    @property
    def difference(self) -> float:
        """Of the perplexities, as a share of the straightforward one."""
        return self.ours / self.straightforward - 1


def compared(lm: Any, text: Any, method: str, sparsity: float) -> Compared:
    """Prune copies of a `LanguageModel` both ways.

    Args:
        lm: a Llama; it is not changed.
        text: a `apportion.weights.pruned_checkpoint.Text`.
        method: ``wanda`` or ``sparsegpt``.
        sparsity: of every row (of every 128 columns in SparseGPT).
    """
    from apportion.models import LanguageModel
    from apportion.weights.one_shot import prune_model
    from apportion.weights.one_shot_catalogue import one_shot_method
    from apportion.weights.patterns import Unstructured
    from apportion.weights.pruned_checkpoint import read_windows

    prune = {"wanda": wanda, "sparsegpt": sparsegpt}[method]
    windows = read_windows(lm, text)
    own = LanguageModel(lm.name, copy.deepcopy(lm.model), lm.tokenizer)
    pattern = Unstructured(sparsity, "row")
    report = prune_model(own, windows.calibration, one_shot_method(method), pattern, error_every=0, progress=False)
    other = copy.deepcopy(lm.model)
    prune_in_place(other, other.model, windows.calibration, lambda weight, inputs: prune(weight, inputs, sparsity))
    pairs = [[model.get_submodule(each.name).weight == 0 for model in (own.model, other)] for each in report.layers]
    same = [float((a == b).double().mean()) for a, b in pairs]
    sizes = [a.numel() for a, _ in pairs]
    return Compared(
        method,
        text.seed,
        *(perplexity(each, windows.evaluation) for each in (lm.model, own.model, other)),
        same[0],
        sum(share * size for share, size in zip(same, sizes, strict=True)) / sum(sizes),
    )


def jittered(lm: Any, text: Any, method: str, sparsity: float, share: float = 1e-6) -> float:
    """The perplexity after straightforward pruning of weights that were changed at random, by a share of themselves.

    Args: see `compared`.
    """
    from apportion.weights.pruned_checkpoint import read_windows

    prune = {"wanda": wanda, "sparsegpt": sparsegpt}[method]
    windows, draws = read_windows(lm, text), np.random.default_rng(0)

    def prune_changed(weight: Array, inputs: Array) -> Array:
        return prune(weight * (1 + share * draws.standard_normal(weight.shape)), inputs, sparsity)

    other = copy.deepcopy(lm.model)
    prune_in_place(other, other.model, windows.calibration, prune_changed)
    return perplexity(other, windows.evaluation)


def table(found: Sequence[Compared]) -> Iterator[str]:
    """Rows of a Markdown table, and what they come to."""
    for each in found:
        yield (
            f"| {each.method} | {each.seed} | {each.ours:.4f} | {each.straightforward:.4f} | {each.difference:+.2%} "
            f"| {each.same_first:.4%} / {each.same_all:.2%} |"
        )
    for method in dict.fromkeys(each.method for each in found):
        rows = [each for each in found if each.method == method]
        if len(rows) > 1:
            mean = statistics.mean(each.difference for each in rows)
            error = statistics.stdev(each.difference for each in rows) / math.sqrt(len(rows))
            spread = statistics.stdev(each.ours for each in rows) / statistics.mean(each.ours for each in rows)
            yield (
                f"{method}: difference {mean:+.2%} in the mean (standard error {error:.2%}), "
                f"{max((each.difference for each in rows), key=abs):+.2%} at most; "
                f"from seed to seed ours varies by {spread:.2%} (standard deviation)"
            )


def _main() -> None:
    from apportion.models import load
    from apportion.weights.pruned_checkpoint import Text

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--method", action="append", choices=("wanda", "sparsegpt"), required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, nargs=2, default=(8, 256), metavar=("COUNT", "TOKENS"))
    parser.add_argument("--evaluation-tokens", type=int, default=4000)
    parser.add_argument("--jittered", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lm = load(given.model)
    samples, context = given.windows
    texts = [
        Text("code", samples=samples, context=context, evaluation_tokens=given.evaluation_tokens, seed=seed)
        for seed in given.seeds
    ]
    if given.jittered:
        for method in given.method:
            for text in texts:
                value = jittered(lm, text, method, given.sparsity)
                print(f"{method}, seed {text.seed}, weights jittered by a millionth: {value:.4f}", flush=True)
        return
    found = []
    print("| method | seed | ours | straightforward float64 | difference | the same zeros: first layer / all |")
    print("|---|---|---|---|---|---|", flush=True)
    for method in given.method:
        for text in texts:
            found.append(compared(lm, text, method, given.sparsity))
            print(next(table(found[-1:])), flush=True)
    for line in list(table(found))[len(found) :]:
        print(line)
    print(f"dense: {found[0].dense:.3f}")


if __name__ == "__main__":
    _main()
