"""What a routing layer remembers between the tokens that it decodes: the last members of each cluster."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.keys.routing_windows import ranks


@dataclass(eq=False)
class Members:
    """The last ``window`` members of each cluster of some heads, each cluster a ring; its size does not grow.

    Attributes:
        keys: of the members.
        values: likewise.
        counts: members that each cluster has had.
    """

    keys: Float[Tensor, "batch heads clusters window d"]
    values: Float[Tensor, "batch heads clusters window d"]
    counts: Int[Tensor, "batch heads clusters"]

    @classmethod
    def of(
        cls,
        keys: Float[Tensor, "batch heads n d"],
        values: Float[Tensor, "batch heads n d"],
        cluster: Int[Tensor, "batch heads n"] | None,
        real: Bool[Tensor, "batch n"],
        clusters: int,
        window: int,
    ) -> "Members":
        """What is left of a prompt.

        Args:
            keys: of the prompt.
            values: of the prompt.
            cluster: of each token; None if all are in the first.
            real: False for padding, which is no member.
            clusters: of a head.
            window: members remembered.
        """
        cluster = torch.zeros_like(keys[..., 0], dtype=torch.int64) if cluster is None else cluster
        rank, counts = ranks(cluster, clusters, real)
        last = real[:, None] & (rank >= counts.gather(2, cluster) - window)
        # What is not kept goes to a place behind all rings.
        place = (cluster * window + rank % window).masked_fill(~last, clusters * window)

        def kept(rows: Tensor) -> Tensor:
            room = rows.new_zeros(*rows.shape[:2], clusters * window + 1, rows.shape[3])
            room.scatter_(2, place[..., None].expand_as(rows), rows)
            return room[:, :, :-1].unflatten(2, (clusters, window))

        return cls(kept(keys), kept(values), counts)

    def read(
        self,
        queries: Float[Tensor, "batch heads 1 d"],
        keys: Float[Tensor, "batch heads 1 d"],
        values: Float[Tensor, "batch heads 1 d"],
        cluster: Int[Tensor, "batch heads 1"] | None,
        *,
        skip_self: bool,
    ) -> Float[Tensor, "batch heads 1 d"]:
        """Let the next token of every row join its cluster (the first if None is given) and read its last members."""
        cluster = torch.zeros_like(keys[..., 0], dtype=torch.int64) if cluster is None else cluster
        window, batch, heads = self.keys.shape[3], *keys.shape[:2]
        here = torch.arange(batch)[:, None], torch.arange(heads)[None], cluster[..., 0]
        slot = self.counts[here] % window
        self.keys[(*here, slot)], self.values[(*here, slot)] = keys[:, :, 0], values[:, :, 0]
        self.counts[here] += 1
        there = self.counts[here].clamp_max(window)
        slots = torch.arange(window, device=keys.device)
        seen = slots < there[..., None]
        if skip_self:
            seen &= (slots != slot[..., None]) | (there[..., None] == 1)
        logits = (self.keys[here] @ queries[:, :, 0, :, None]).squeeze(-1) * queries.shape[-1] ** -0.5
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        return weights[:, :, None] @ self.values[here]


@dataclass(eq=False)
class RoutingState:
    """What `RoutingAttention.step` needs of the tokens before.

    Attributes:
        nearby: members of the local heads' one cluster; None for the paper's variant.
        alike: members of the routing heads' clusters; None for the paper's variant.
        inputs: everything the layer was given; only for the paper's variant.
        real: False for padding among the inputs.
    """

    nearby: Members | None
    alike: Members | None
    inputs: Float[Tensor, "batch n d_model"] | None
    real: Bool[Tensor, "batch n"] | None

    def bytes_held(self) -> int:
        """What the state occupies."""
        held = [self.inputs] if self.inputs is not None else []
        for each in (self.nearby, self.alike):
            if each is not None:
                held += [each.keys, each.values, each.counts]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)
