"""The clusters of a routing head: centroids that follow the tokens, and the random clusters to compare with."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import layer_norm, one_hot
from typing_extensions import override

from apportion.errors import InputError

KMEANS_ROUNDS = 10


class Centroids(nn.Module):
    """Centroids of each head, moved by running counts and sums and never by a gradient.

    They are buffers: no optimiser sees them, and they are part of every checkpoint.

    Args:
        heads: each has centroids of its own.
        clusters: how many.
        width: of a head's vectors.
        decay: what is left of the running counts and sums after an update.
        epsilon: added to every running count, the counts being scaled so that their sum stays (Laplace).
        start: ``normal`` draws centroids at random and normalises them; ``tokens`` waits for the first batch seen in
            training, draws tokens of it and lets k-means run for 10 rounds.

    Attributes:
        centroids: where the clusters are, [heads, clusters, width].
        ready: False until ``tokens`` has seen a batch.
    """

    centroids: Tensor
    counts: Tensor
    sums: Tensor
    ready: Tensor

    def __init__(self, heads: int, clusters: int, width: int, decay: float, epsilon: float, start: str) -> None:
        super().__init__()
        self.decay, self.epsilon = decay, epsilon
        drawn = layer_norm(torch.randn(heads, clusters, width), (width,))
        self.register_buffer("centroids", drawn)
        self.register_buffer("counts", torch.ones(heads, clusters))
        self.register_buffer("sums", drawn.clone())
        self.register_buffer("ready", torch.tensor(start == "normal"))
        self._seen: tuple[Tensor, Tensor] | None = None

    def scores(self, vectors: Float[Tensor, "batch heads n d"]) -> Float[Tensor, "batch heads n clusters"]:
        """Products of the (normalised) vectors with the centroids; the largest says which cluster a token is in.

        Centroids are compared at one length. That changes which cluster a token is assigned to, since the mean of
        loose members is short, and not which tokens a cluster likes best.

        Raises:
            InputError: the centroids wait for a first training batch.
        """
        if not self.ready:
            raise InputError(
                "the centroids have seen no tokens yet: run a training batch first, or give start='normal'"
            )
        return vectors @ layer_norm(self.centroids, self.centroids.shape[-1:]).transpose(-1, -2)

    @torch.no_grad()
    def begin(self, vectors: Float[Tensor, "batch heads n d"], real: Bool[Tensor, "batch n"]) -> None:
        """Start from these tokens, if nothing has been started from yet."""
        if self.ready:
            return
        clusters = self.centroids.shape[1]
        of_head = vectors.transpose(0, 1)[:, real]
        if of_head.shape[1] < clusters:
            raise InputError(f"the first batch has {of_head.shape[1]} tokens: at least clusters={clusters}")
        chosen = torch.randperm(of_head.shape[1], device=vectors.device)[:clusters]
        self.centroids.copy_(of_head[:, chosen])
        self.ready.fill_(True)
        for _ in range(KMEANS_ROUNDS):
            counts, sums = self._members([(vectors, self.scores(vectors))], real)
            self.centroids.copy_(_where_any(counts, sums / counts[..., None].clamp_min(1), self.centroids))
        self.counts.fill_(1)
        self.sums.copy_(self.centroids)

    @torch.no_grad()
    def see(
        self,
        parts: list[tuple[Float[Tensor, "batch heads n d"], Float[Tensor, "batch heads n clusters"]]],
        real: Bool[Tensor, "batch n"],
    ) -> None:
        """Remember, until the next `update`, who is in which cluster; what was seen before is forgotten.

        A forward pass that gradient checkpointing repeats is therefore counted once.

        Args:
            parts: vectors and their scores: of the shared queries and keys, or of queries and of keys.
            real: False for padding.
        """
        self._seen = self._members(parts, real)

    @torch.no_grad()
    def update(self) -> None:
        """Move the centroids towards the means of the members seen last; those of empty clusters stay.

        With torch.distributed the members of all processes count.
        """
        if self._seen is None:
            return
        (counts, sums), self._seen = self._seen, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.counts.sum(-1, keepdim=True)
        smoothed = (self.counts + self.epsilon) / (total + self.counts.shape[-1] * self.epsilon) * total
        self.centroids.copy_(_where_any(counts, self.sums / smoothed[..., None], self.centroids))

    def _members(self, parts: list[tuple[Tensor, Tensor]], real: Tensor) -> tuple[Tensor, Tensor]:
        """How many members each cluster has, and their sum, over the batch."""
        counts, sums = torch.zeros_like(self.counts), torch.zeros_like(self.sums)
        for vectors, scores in parts:
            member = one_hot(scores.argmax(-1), scores.shape[-1]).to(vectors.dtype) * real[:, None, :, None]
            counts += member.sum((0, 2))
            sums += torch.einsum("bhnc,bhnd->hcd", member, vectors)
        return counts, sums


class RandomClusters(Centroids):
    """Clusters that know nothing of the tokens, drawn anew at every call: what routing has to beat."""

    @override
    def scores(self, vectors: Float[Tensor, "batch heads n d"]) -> Float[Tensor, "batch heads n clusters"]:
        return torch.rand(*vectors.shape[:3], self.centroids.shape[1], device=vectors.device)

    @override
    def update(self) -> None:
        self._seen = None


def commitment(
    vectors: Float[Tensor, "batch heads n d"],
    cluster: Int[Tensor, "batch heads n"],
    centroids: Float[Tensor, "heads clusters d"],
    real: Bool[Tensor, "batch n"],
) -> Float[Tensor, ""]:
    """Mean squared distance of the coordinates of real tokens from those of their centroids, which stay fixed."""
    heads = torch.arange(centroids.shape[0], device=vectors.device)[:, None]
    apart = (vectors - centroids.detach()[heads, cluster]).square() * real[:, None, :, None]
    return apart.sum() / (real.sum() * vectors.shape[1] * vectors.shape[3]).clamp_min(1)


def _where_any(counts: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(counts[..., None] > 0, new, old)
