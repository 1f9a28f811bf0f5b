"""Averages of networks: weights of equal masks, and batch norms that fit again."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apportion.errors import InputError
from apportion.training.state import module_tensors, restore_module


@torch.no_grad()
def average(candidates: Sequence[nn.Module], weights: Sequence[float] | None = None) -> nn.Module:
    """A network whose parameters and floating buffers are the average of the candidates'.

    The masks must be the same in all, so the average is just as sparse. Integer buffers are the first candidate's. A
    tensor that two layers share is averaged once. Batch norms fit no more: see `repair_batch_norm`.

    Args:
        candidates: networks of one kind.
        weights: that sum to 1; all the same if None. A candidate of weight 1 comes back bit for bit.

    Raises:
        InputError: there is no candidate; they are of different kinds; their masks differ; a weight is not finite.
    """
    if not candidates:
        raise InputError("candidates is empty: give at least one network to average")
    shares = [1 / len(candidates)] * len(candidates) if weights is None else list(weights)
    if len(shares) != len(candidates) or not math.isclose(math.fsum(shares), 1, abs_tol=1e-6):
        raise InputError(f"weights={shares} for {len(candidates)} candidates: give one each, that sum to 1")
    tensors = [module_tensors(each) for each in candidates]
    learned = {name for name, _ in candidates[0].named_parameters()}
    for place, own in enumerate(tensors):
        _check_kind(tensors[0], own, place)
        for name in sorted(learned):
            if not bool(own[name].isfinite().all()):
                raise InputError(f"{name} of candidate {place} is not finite: its training diverged; leave it out")
    mixed = {name: _mix([own[name] for own in tensors], shares) for name in tensors[0]}
    soup = copy.deepcopy(candidates[0])
    restore_module(soup, mixed)
    return soup


def greedy(candidates: Sequence[nn.Module], score: Callable[[nn.Module], float]) -> tuple[list[int], nn.Module]:
    """A soup to which each candidate is added if it does not make it worse, from the best one down (GreedySoup).

    Args:
        candidates: networks that can be averaged.
        score: more is better; on validation data, never on those that are to judge. It may repair batch norms first.

    Returns:
        The places of those that are in the soup, and the soup, which scores no less than the best candidate.

    Raises:
        InputError: there is no candidate, or they cannot be averaged.
    """
    if not candidates:
        raise InputError("candidates is empty: give at least one network to choose from")
    scores = [score(each) for each in candidates]
    order = sorted(range(len(candidates)), key=lambda place: -scores[place])
    chosen, best, soup = [order[0]], scores[order[0]], average([candidates[order[0]]])
    for place in order[1:]:
        tried = average([candidates[each] for each in (*chosen, place)])
        reached = score(tried)
        if reached >= best:
            chosen, best, soup = [*chosen, place], reached, tried
    return chosen, soup


def has_batch_norm(network: nn.Module) -> bool:
    """Whether the network keeps statistics of its activations, which an average of weights makes wrong."""
    return any(isinstance(each, _BatchNorm) and each.track_running_stats for each in network.modules())


def repair_batch_norm(network: nn.Module, batches: Iterable[Any] | None) -> None:
    """Estimate the statistics of batch norms anew, as the plain mean over batches; other networks stay as they are.

    Args:
        network: changed in place.
        batches: inputs, or tuples that begin with them, of the training data.

    Raises:
        InputError: the network has batch norms and there is no batch.
    """
    if not has_batch_norm(network):
        return
    given = [] if batches is None else list(batches)
    if not given:
        raise InputError("the network has batch norms and there are no batches: give some of the training data")
    device = next(network.parameters()).device
    torch.optim.swa_utils.update_bn(given, network, device)


def distances(candidates: Sequence[nn.Module]) -> list[float]:
    """How far each candidate is from their average, by the average's length: 0 where averaging does nothing."""
    vectors = [torch.cat([each.detach().flatten().double() for each in own.parameters()]) for own in candidates]
    centre = torch.stack(vectors).mean(0)
    return [float((each - centre).norm() / centre.norm()) for each in vectors]


def _check_kind(first: dict[str, Tensor], own: dict[str, Tensor], place: int) -> None:
    if first.keys() != own.keys():
        name = sorted(first.keys() ^ own.keys())[0]
        raise InputError(f"candidate {place} and candidate 0 are of different kinds: only one of them has {name}")
    for name, tensor in own.items():
        other = first[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise InputError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} in candidate {place} and {other.dtype} "
                f"{list(other.shape)} in candidate 0: they must be of one kind"
            )
        if tensor.dtype == torch.bool and not torch.equal(tensor, other):
            raise InputError(
                f"{name} differs in candidate {place} and candidate 0: an average over different masks is denser than "
                "both; retrain from one pruned network, or remove_masks, average, and prune again"
            )


def _mix(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    if not tensors[0].is_floating_point():
        return tensors[0]
    # One by one in double precision, so that a share of 1 gives the tensor itself and the order hardly matters.
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        if share:
            total += share * tensor.double()
    return total.to(tensors[0].dtype)
