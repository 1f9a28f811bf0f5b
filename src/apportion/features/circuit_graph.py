"""A circuit as a graph: parts of a model on a prompt, what they contribute to each other, and what is left over."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from apportion.errors import InputError

Kind = Literal["feature", "head", "embedding", "skip", "error", "mlp", "bias", "logit"]


@dataclass(frozen=True, order=True)
class Node:
    """A part of a circuit.

    Attributes:
        kind: ``feature`` of a transcoder, ``head``, ``embedding``, ``skip`` path, ``logit``; and what is not explained
            any further: transcoder ``error``, ``mlp`` without a transcoder, ``bias``.
        token: position of it in the prompt; of a head, of the token that it writes to.
        layer: where it is; None for embeddings, logits, and sums over layers.
        index: the feature, the head, or the vocabulary entry of a logit.
        source: of a head, the token that it reads.
    """

    kind: Kind
    token: int
    layer: int | None = None
    index: int | None = None
    source: int | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Layer and index of a feature or head."""
        if self.layer is None or self.index is None:
            raise ValueError(f"{self} has no layer and index")
        return self.layer, self.index

    @property
    def reads_at(self) -> int:
        """The token at which its own parts are."""
        return self.token if self.source is None else self.source

    def __str__(self) -> str:
        name = self.kind if self.layer is None else f"layer {self.layer} {self.kind}"
        name = name if self.index is None else f"{name} {self.index}"
        return f"{name} at {self.token}" if self.source is None else f"{name}, {self.source} to {self.token}"


@dataclass
class Figures:
    """What is known of a node.

    Attributes:
        value: what it contributes to the root over the kept paths (greedy), or what it fires with (influence).
        pruned: what of ``value`` came from parts that were not kept; 0 where the node was not taken apart.
        expanded: whether it was taken apart; then its value is the sum of the edges into it plus ``pruned``.
        activation: of a feature.
        influence: share of all influence on the root (influence only).
    """

    value: float = 0.0
    pruned: float = 0.0
    expanded: bool = False
    activation: float | None = None
    influence: float | None = None


@dataclass(frozen=True, eq=False)
class Circuit:
    """A graph of parts, from embeddings and features up to a root.

    Attributes:
        root: what is explained.
        nodes: the parts and their figures.
        edges: by (child, parent), how much of the parent's value comes from the child.
        input_ids: the prompt.
        method: how it was found, with its settings.
    """

    root: Node
    nodes: dict[Node, Figures]
    edges: dict[tuple[Node, Node], float]
    input_ids: list[int]
    method: dict[str, Any] = field(default_factory=dict)

    def into(self, node: Node) -> dict[Node, float]:
        """A node's children and what each contributes."""
        return {child: value for (child, parent), value in self.edges.items() if parent == node}

    def imbalance(self) -> float:
        """The largest gap between a node's value and the sum of its parts, relative to the sizes of these."""
        gaps = [0.0]
        for node, figures in self.nodes.items():
            if figures.expanded:
                parts = [*self.into(node).values(), figures.pruned]
                gaps.append(abs(figures.value - sum(parts)) / max(sum(map(abs, parts)), 1e-30))
        return max(gaps)

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-ready; nodes are numbered, the root first."""
        order = [self.root, *(node for node in self.nodes if node != self.root)]
        number = {node: place for place, node in enumerate(order)}
        return {
            "format": "apportion.circuit/1",
            "input_ids": self.input_ids,
            "method": self.method,
            "nodes": [{**asdict(node), **asdict(self.nodes[node])} for node in order],
            "edges": [
                {"child": number[child], "parent": number[parent], "value": value}
                for (child, parent), value in self.edges.items()
            ],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Circuit":
        """What ``to_json`` wrote.

        Raises:
            InputError: it is something else.
        """
        if content.get("format") != "apportion.circuit/1":
            raise InputError("this is not a circuit that apportion wrote (format apportion.circuit/1)")
        places = ("kind", "token", "layer", "index", "source")
        nodes = [Node(**{name: each[name] for name in places}) for each in content["nodes"]]
        figures = [Figures(**{name: each[name] for name in each if name not in places}) for each in content["nodes"]]
        edges = {(nodes[each["child"]], nodes[each["parent"]]): each["value"] for each in content["edges"]}
        return cls(
            nodes[0], dict(zip(nodes, figures, strict=True)), edges, list(content["input_ids"]), dict(content["method"])
        )
