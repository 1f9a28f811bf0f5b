"""Wanda and SparseGPT written a second time, in float64, straight from what the papers ask for.

Nothing here is shared with the package: inputs come from hooks in transformers' own forward pass, ties and rounding
are spelt out, and SparseGPT solves by elimination (one column at a time the inverse second moments lose that column;
every row is moved at once; nothing waits) instead of with a Cholesky factor and lazy updates.

    PYTHONPATH=src python tests/support/straightforward_pruning.py wanda 0.5

prunes SmolLM2 both ways on the same text, and prints perplexities side by side (SparseGPT takes some minutes).
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
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


def prune_in_place(model: Any, blocks: Any, ids: torch.Tensor, prune: Callable[[Array, Array], Array]) -> None:
    """Prune every linear layer of a transformers model, block by block, with whole forward passes."""
    for block in blocks:
        linears = {name: each for name, each in block.named_modules() if isinstance(each, torch.nn.Linear)}
        inputs = _inputs(model, linears, ids)
        for name, linear in linears.items():
            pruned = prune(linear.weight.detach().double().numpy(), inputs[name])
            linear.weight.data.copy_(torch.from_numpy(pruned))


class _Seen(Exception):
    """The block that was asked for has run."""


@torch.no_grad()
def _inputs(model: Any, linears: Mapping[str, torch.nn.Linear], ids: torch.Tensor) -> dict[str, Array]:
    found: dict[str, list[Array]] = {name: [] for name in linears}
    last = next(reversed(linears))

    def keeper(name: str) -> Any:
        def keep(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            found[name].append(args[0].double().numpy().reshape(-1, args[0].shape[-1]))
            if name == last:
                raise _Seen

        return keep

    handles = [each.register_forward_pre_hook(keeper(name)) for name, each in linears.items()]
    for row in ids:
        with contextlib.suppress(_Seen):
            model(row.unsqueeze(0), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(each) for name, each in found.items()}


def perplexity(model: Any, ids: torch.Tensor) -> float:
    """Of the model's own loss, row by row."""
    with torch.no_grad():
        losses = [float(model(row.unsqueeze(0), labels=row.unsqueeze(0), use_cache=False).loss) for row in ids]
    return float(np.exp(np.mean(losses)))


def _compared(name: str, sparsity: float) -> Iterator[str]:
    from apportion.models import load
    from apportion.weights.one_shot import prune_model
    from apportion.weights.one_shot_catalogue import one_shot_method
    from apportion.weights.patterns import Unstructured
    from apportion.weights.pruned_checkpoint import Text, read_windows

    straightforward = {"wanda": wanda, "sparsegpt": sparsegpt}[name]
    lm = load("smollm2")
    dense = {key: each.clone() for key, each in lm.model.state_dict().items()}
    windows = read_windows(lm, Text("code", samples=8, context=256, evaluation_tokens=4000))
    yield f"dense: {perplexity(lm.model, windows.evaluation):.3f} on {windows.evaluation.numel()} tokens"
    pattern = Unstructured(sparsity, "row")
    report = prune_model(lm, windows.calibration, one_shot_method(name), pattern, error_every=0, progress=False)
    own = perplexity(lm.model, windows.evaluation)
    zeros = {each.name: lm.model.get_submodule(each.name).weight == 0 for each in report.layers}
    lm.model.load_state_dict(dense)
    blocks = lm.model.model.layers
    prune_in_place(
        lm.model, blocks, windows.calibration, lambda weight, inputs: straightforward(weight, inputs, sparsity)
    )
    other = perplexity(lm.model, windows.evaluation)
    yield f"{name} at {sparsity:.0%}: {own:.4f}, straightforward float64 {other:.4f}: {own / other - 1:+.3%}"
    same = [float((each == (lm.model.get_submodule(key).weight == 0)).float().mean()) for key, each in zeros.items()]
    yield f"the same weights are 0: {same[0]:.4%} in the first layer, {sum(same) / len(same):.4%} in all"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in _compared(sys.argv[1], float(sys.argv[2])):
        print(line, flush=True)
