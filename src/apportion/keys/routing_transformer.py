"""Routing attention: tokens read the tokens of their own cluster, and clusters follow the tokens.

*Efficient Content-Based Sparse Attention with Routing Transformers* (Roy, Saffar, Vaswani, Grangier 2021,
arXiv 2003.05997).

What is allocated: ``w`` token slots to each of ``c`` clusters of a head. Half of the heads read a window of the newest
tokens; the other half read the tokens whose vectors lie near the same centroid, wherever they are. With ``c`` about
the square root of ``n`` that is of the order of ``n ** 1.5`` products instead of ``n ** 2``.

Symbols: ``c`` = clusters, ``w`` = window, ``mu`` = `Centroids.centroids`, ``lambda`` = decay, ``beta`` of the
commitment loss = commitment, ``x`` = the vector that serves as query and key in a causal head.

Two variants:

- ``strict`` (ours, the default): a token joins its nearest cluster and reads the last ``w`` members of it up to itself.
  What a token reads depends on nothing later, so perplexities are those of a causal model, and decoding one token at a
  time gives the same as a pass over the text. With one cluster and ``w = n`` it is full causal attention.
- ``paper``: each cluster takes its ``w`` best tokens of the *whole* sequence, which then read the earlier ones among
  them. Which tokens are taken depends on later tokens: the figures of a language model are not strictly causal.

Departures from the paper and its code: the strict variant; a local head reads exactly the newest ``local_window``
tokens instead of its block and the one before; local heads have queries and keys of their own; centroids are compared
at one length (see `Centroids.scores`); a cluster without members stays where it is; there is no relative position bias
inside clusters, so positions must be in what the layer is given. That a token reads itself only if it must is as in
lucidrains' implementation.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.routing_clusters import Centroids, RandomClusters, commitment
from apportion.keys.routing_state import Members, RoutingState
from apportion.keys.routing_windows import Read, attend_chosen_members, attend_recent_members


@dataclass(frozen=True)
class RoutingSettings:
    """Settings of `RoutingAttention`; the defaults are the paper's for WikiText-103 at 4,096 tokens.

    Attributes:
        width: of the layer's input and output.
        heads: local and routing heads together.
        routing_heads: how many of them route; None for half.
        clusters: of each routing head.
        window: tokens a cluster takes (``paper``), or members of it that a token reads (``strict``).
        local_window: newest tokens that a token reads in a local head, itself included.
        length: tokens of the longest sequence.
        causal: a token reads none that comes later, and queries are the keys. False for encoders: queries and keys
            have projections of their own, and local heads read ``local_window - 1`` tokens on either side.
        variant: ``strict`` or ``paper``; see the module. An encoder has only ``paper``.
        mask_self: where queries are the keys, a token reads itself only if there is nothing else.
        decay: of the running counts and sums that centroids follow.
        commitment: weight of the loss that keeps tokens near their centroids.
        scatter_epsilon: see `attend_chosen_members`.
        count_epsilon: see `Centroids`.
        start: of the centroids; see `Centroids`.

    Raises:
        InputError: a value that cannot work.
    """

    width: int = 1024
    heads: int = 16
    routing_heads: int | None = None
    clusters: int = 8
    window: int = 512
    local_window: int = 256
    length: int = 4096
    causal: bool = True
    variant: Literal["strict", "paper"] = "strict"
    mask_self: bool = True
    decay: float = 0.999
    commitment: float = 1e-4
    scatter_epsilon: float = 1e-2
    count_epsilon: float = 1e-5
    start: Literal["normal", "tokens"] = "normal"

    def __post_init__(self) -> None:
        for name in ("width", "heads", "clusters", "window", "local_window", "length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: at least 1")
        if self.width % self.heads:
            raise InputError(f"width={self.width} is not a multiple of heads={self.heads}")
        if self.routing_heads is None and self.heads % 2:
            raise InputError(f"heads={self.heads} cannot be halved: give routing_heads")
        if self.routing_heads is not None and not 0 <= self.routing_heads <= self.heads:
            raise InputError(f"routing_heads={self.routing_heads}: from 0 to heads={self.heads}")
        if self.window > self.length:
            raise InputError(f"window={self.window} is more than length={self.length}: a cluster cannot be filled")
        if self.variant not in ("strict", "paper") or self.start not in ("normal", "tokens"):
            raise InputError(
                f"variant={self.variant!r}, start={self.start!r}: 'strict' or 'paper', 'normal' or 'tokens'"
            )
        if not self.causal and self.variant == "strict":
            raise InputError("causal=False with variant='strict': an encoder needs variant='paper'")
        if not 0 <= self.decay < 1:
            raise InputError(f"decay={self.decay}: from 0 up to, but not, 1")

    @property
    def routed(self) -> int:
        """How many heads route."""
        return self.heads // 2 if self.routing_heads is None else self.routing_heads

    @property
    def head_width(self) -> int:
        """Coordinates of a head."""
        return self.width // self.heads


@dataclass(frozen=True, eq=False)
class Routed:
    """What `RoutingAttention` gives.

    Attributes:
        output: the layer's; zeros for padding, but for the bias of the last projection.
        commitment_loss: to be added to the training loss, weighted already; 0 without routing heads.
        keys_per_query: mean over real tokens, by head: local heads first.
        uncovered: share of real tokens that no cluster took, by routing head.
    """

    output: Float[Tensor, "batch n d_model"]
    commitment_loss: Float[Tensor, ""]
    keys_per_query: Float[Tensor, " heads"]
    uncovered: Float[Tensor, " routed"]


class RoutingAttention(nn.Module):
    """An attention layer of local and routing heads. It adds no residual and normalises no input.

    In training call `update_centroids` after every optimiser step (`FollowTokens` does), and add ``commitment_loss``.

    Args:
        settings: see `RoutingSettings`.
        random: clusters are drawn anew at every call; the baseline that routing has to beat.

    Examples:
        >>> import torch
        >>> from apportion.keys import RoutingAttention, RoutingSettings
        >>> settings = RoutingSettings(width=64, heads=4, clusters=4, window=8, local_window=8, length=32)
        >>> routed = RoutingAttention(settings)(torch.randn(2, 32, 64))
        >>> routed.output.shape
        torch.Size([2, 32, 64])
    """

    def __init__(self, settings: RoutingSettings, *, random: bool = False) -> None:
        super().__init__()
        self.settings = settings
        width, head_width = settings.width, settings.head_width
        self._local = settings.heads - settings.routed
        keyed = self._local if settings.causal else settings.heads
        self.query = nn.Linear(width, width, bias=False)
        # Routing heads of a causal layer have none.
        self.key = nn.Linear(width, keyed * head_width, bias=False) if keyed else None
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        kind = RandomClusters if random else Centroids
        start = "normal" if random else settings.start
        self.clusters = kind(
            settings.routed, settings.clusters, head_width, settings.decay, settings.count_epsilon, start
        )
        if settings.routed and settings.clusters * settings.window < settings.length:
            warnings.warn(
                f"clusters={settings.clusters} times window={settings.window} is less than length={settings.length}: "
                "some tokens go unread in routing heads",
                stacklevel=2,
            )

    @override
    def forward(self, x: Float[Tensor, "batch n d_model"], real: Bool[Tensor, "batch n"] | None = None) -> Routed:
        """Read.

        Args:
            x: the layer's input.
            real: False for padding, on either side; None where nothing is padded.

        Raises:
            InputError: more tokens than the settings allow, another width.
        """
        self._check(x)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
        queries, keys, values = self._project(x)
        reads: list[Read] = []
        loss, uncovered = x.new_zeros(()), x.new_zeros(self.settings.routed)
        if self._local:
            reads.append(self._read_locally(queries, keys, values, real))
        if self.settings.routed:
            routed, loss = self._read_clusters(queries, keys, values, real)
            reads.append(routed)
            uncovered = _mean((routed.clusters == 0) & real[:, None], real)
        output = self.out(torch.cat([each.output for each in reads], dim=1).transpose(1, 2).flatten(2))
        return Routed(output, loss, _mean(torch.cat([each.keys for each in reads], dim=1), real), uncovered)

    def update_centroids(self) -> None:
        """Move the centroids to where the tokens of the last training pass were; nothing happens in eval mode."""
        if self.training:
            self.clusters.update()

    @torch.no_grad()
    def begin(
        self, x: Float[Tensor, "batch n d_model"], real: Bool[Tensor, "batch n"] | None = None
    ) -> tuple[Float[Tensor, "batch n d_model"], RoutingState]:
        """Read a prompt and remember what the tokens after it need; then come `step` after `step`.

        Raises:
            InputError: an encoder has no next token; see ``forward``.
        """
        if not self.settings.causal:
            raise InputError("causal=False: an encoder does not decode")
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
        output = self(x, real).output
        if self.settings.variant == "paper":
            return output, RoutingState(None, None, x, real)
        queries, keys, values = self._project(x)
        local, settings = self._local, self.settings
        nearby = Members.of(keys[:, :local], values[:, :local], None, real, 1, settings.local_window)
        vectors = queries[:, local:]
        cluster = self.clusters.scores(vectors).argmax(-1) if settings.routed else None
        alike = Members.of(vectors, values[:, local:], cluster, real, settings.clusters, settings.window)
        return output, RoutingState(nearby, alike, None, None)

    @torch.no_grad()
    def step(self, x: Float[Tensor, "batch 1 d_model"], state: RoutingState) -> Float[Tensor, "batch 1 d_model"]:
        """Read as the next token of every row; ``state`` is brought up to date.

        The strict variant costs ``window`` products a head, whatever the length. The paper's has to look at all tokens
        again, since each one may move others out of their clusters: its outputs differ from those of a whole pass.
        """
        if state.inputs is not None and state.real is not None:
            state.inputs = torch.cat([state.inputs, x], dim=1)
            state.real = torch.cat([state.real, torch.ones_like(state.real[:, :1])], dim=1)
            return self(state.inputs, state.real).output[:, -1:]
        assert state.nearby is not None, "begin() makes both"
        assert state.alike is not None, "begin() makes both"
        queries, keys, values = self._project(x)
        local, settings = self._local, self.settings
        parts = [state.nearby.read(queries[:, :local], keys[:, :local], values[:, :local], None, skip_self=False)]
        if settings.routed:
            vectors = queries[:, local:]
            cluster = self.clusters.scores(vectors).argmax(-1)
            parts.append(state.alike.read(vectors, vectors, values[:, local:], cluster, skip_self=settings.mask_self))
        output: Tensor = self.out(torch.cat(parts, dim=1).transpose(1, 2).flatten(2))
        return output

    def _check(self, x: Tensor) -> None:
        if x.shape[2] != self.settings.width:
            raise InputError(f"the input has width {x.shape[2]}: this layer has width={self.settings.width}")
        if x.shape[1] > self.settings.length:
            raise InputError(f"{x.shape[1]} tokens: this layer was made for length={self.settings.length} at most")

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, local ones first; queries and keys of routing heads normalised."""

        def by_head(projected: Tensor) -> Tensor:
            return projected.unflatten(2, (-1, self.settings.head_width)).transpose(1, 2)

        queries, values = by_head(self.query(x)), by_head(self.value(x))
        keys = queries[:, :0] if self.key is None else by_head(self.key(x))
        return self._normalised(queries), self._normalised(keys), values

    def _normalised(self, heads: Tensor) -> Tensor:
        local, width = self._local, self.settings.head_width
        return torch.cat([heads[:, :local], layer_norm(heads[:, local:], (width,))], dim=1)

    def _read_locally(self, queries: Tensor, keys: Tensor, values: Tensor, real: Tensor) -> Read:
        queries, keys, values = (each[:, : self._local] for each in (queries, keys, values))
        one = torch.zeros(queries.shape[:3], dtype=torch.int64, device=queries.device)
        window, both_sides = self.settings.local_window, not self.settings.causal
        return attend_recent_members(queries, keys, values, one, real, clusters=1, window=window, both_sides=both_sides)

    def _read_clusters(self, queries: Tensor, keys: Tensor, values: Tensor, real: Tensor) -> tuple[Read, Tensor]:
        settings, local = self.settings, self._local
        queries, values = queries[:, local:], values[:, local:]
        keys = queries if settings.causal else keys[:, local:]
        if self.training:
            self.clusters.begin(queries, real)
        # The choice is not differentiable, and the centroids are not trained.
        with torch.no_grad():
            parts = [(each, self.clusters.scores(each)) for each in ([queries] if settings.causal else [queries, keys])]
            if self.training:
                self.clusters.see(parts, real)
        query_scores, key_scores = parts[0][1], parts[-1][1]
        skip_self = settings.causal and settings.mask_self
        if settings.variant == "strict":
            read = attend_recent_members(
                queries,
                keys,
                values,
                query_scores.argmax(-1),
                real,
                clusters=settings.clusters,
                window=settings.window,
                skip_self=skip_self,
            )
        else:
            read = attend_chosen_members(
                queries,
                keys,
                values,
                query_scores,
                key_scores,
                real,
                window=settings.window,
                causal=settings.causal,
                skip_self=skip_self,
                epsilon=settings.scatter_epsilon,
            )
        centroids = self.clusters.centroids
        losses = [commitment(each, scores.argmax(-1), centroids, real) for each, scores in parts]
        return read, settings.commitment * torch.stack(losses).mean()


class FollowTokens:
    """A hook of `apportion.training.train`: the centroids of all routing layers follow the tokens of each step."""

    def before_step(self, module: nn.Module, step: int) -> None:
        """Nothing."""
        return

    def after_step(self, module: nn.Module, step: int, metrics: dict[str, int | float | Tensor]) -> None:
        """Move the centroids."""
        for each in module.modules():
            if isinstance(each, RoutingAttention):
                each.update_centroids()


def _mean(values: Tensor, real: Tensor) -> Tensor:
    """Of [batch, heads, n], over real tokens, by head; what padding has must be 0."""
    return values.sum((0, 2)).detach() / real.sum().clamp_min(1)
