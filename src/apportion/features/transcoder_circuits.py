"""Circuits of transcoder features: what on a prompt makes a feature fire, or a logit large, step by step.

*Transcoders Find Interpretable LLM Feature Circuits* (Dunefsky, Chlenski, Nanda 2024, arXiv 2406.11944). What is
allocated is the reader's attention: of thousands of (feature, token), (head, source token) and embedding terms that add
up to a value, a search keeps the ``branches`` largest at each step. With patterns and norms held fixed and given which
features fire, all of it is linear, and a term is an activation (of the input) times a connection (of the weights):

| paper | here |
|---|---|
| attribution ``f_i (W_dec[i] . v)`` of a feature below | ``Parts.features`` |
| ``A[h,t,s] x_s W_OV v``, head and source token | ``Parts.heads`` |
| ``v' = (d_i . v) w_i``, one step further up | ``of_feature(...).scaled(d_i . v)`` |
| LayerNorm as one constant a direction and token | ``ln="scalar"``; the default ``exact`` is the exact linear map |
| greedy search, num_iters, num_branches | ``greedy_circuit(iterations, branches)`` |

Where we differ from the authors' code: every node keeps the books (its value is the sum of its children, of the error
of transcoders, of MLPs without one, of biases, and of what was pruned, to rounding); sources at the first token count
(there they vanish into the rest); terms are ranked by size, so that what suppresses is seen as well; the threshold
helper, which takes the wrong cap, is left out (the authors' notebooks use raw attributions as well).

`influence_circuit` is the alternative of circuit-tracer (Ameisen et al. 2025, "Circuit Tracing"): readings pass through
attention at once, all features that fire compete, and what is kept covers 80 % of the influence on the root, with 98 %
of that between what is kept.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.errors import InputError
from apportion.features.frozen_pass import FrozenPass, LayerNorms, Reading
from apportion.features.transcoder import Transcoder

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


# --- one step: the parts of a reading --------------------------------------------------------------------------------


@dataclass(eq=False)
class Parts:
    """What a reading at one token is the sum of.

    Attributes:
        features: contribution of each feature that fires below, by node.
        heads: of each head and source token below.
        others: embedding, skip paths.
        unexplained: transcoder errors, MLPs without a transcoder, biases.
        directions: for a head, how its output is read; for a skip path, how the MLP's input is; a feature's factor.
    """

    features: dict[Node, float] = field(default_factory=dict)
    heads: dict[Node, float] = field(default_factory=dict)
    others: dict[Node, float] = field(default_factory=dict)
    unexplained: dict[Node, float] = field(default_factory=dict)
    directions: dict[Node, Any] = field(default_factory=dict)

    @property
    def candidates(self) -> dict[Node, float]:
        """All that a search may keep."""
        return {**self.features, **self.heads, **self.others}

    def total(self) -> float:
        """The reading's value."""
        return sum(self.candidates.values()) + sum(self.unexplained.values())


def parts_of(frozen: FrozenPass, reading: Reading, token: int, bias: float = 0.0) -> Parts:
    """Take a reading at a token apart.

    Args:
        frozen: the pass it was taken from, made with ``attention="nodes"``.
        reading: what is to be explained.
        token: where it reads the stream.
        bias: what is to be explained beyond the reading.
    """
    parts = Parts()
    parts.others[Node("embedding", token)] = float(reading.embedding[token] @ frozen.embedding_written[token])
    bias, error, whole = bias + reading.constant, 0.0, 0.0
    for layer in frozen.layers_with_gradient(reading.attention, token):
        direction = reading.attention[layer, token]
        shares, by_head = frozen.heads_of(layer, direction, token)
        bias += float(direction @ frozen.attention_written[layer][token]) - float(shares.sum())
        for head, source in shares.nonzero().tolist():
            node = Node("head", token, layer, head, source)
            parts.heads[node] = float(shares[head, source])
            parts.directions[node] = by_head[head]
    for layer in frozen.layers_with_gradient(reading.mlps, token):
        direction = reading.mlps[layer, token]
        whole += float(direction @ frozen.whole[layer][token])
        if layer not in frozen.transcoders:
            continue
        transcoder, firing = frozen.transcoders[layer], frozen.firing[layer]
        here = (firing.tokens == token).nonzero().flatten()
        features = firing.features[here]
        factors = transcoder.decoder_weight.detach()[features].to(direction.dtype) @ direction
        for feature, factor, value in zip(
            features.tolist(), factors.tolist(), firing.values[here].tolist(), strict=True
        ):
            node = Node("feature", token, layer, feature)
            parts.features[node], parts.directions[node] = factor * value, factor
        error += float(direction @ frozen.errors[layer][token])
        if frozen.whole[layer][token].any():
            continue  # this token's MLP is one part
        bias += float(direction @ transcoder.decoder_bias.detach().to(direction.dtype))
        if layer in frozen.skips:
            assert transcoder.skip_weight is not None
            node = Node("skip", token, layer)
            parts.others[node] = float(direction @ frozen.skips[layer][token])
            parts.directions[node] = direction @ transcoder.skip_weight.detach().to(direction.dtype)
    for kind, value in (("error", error), ("mlp", whole), ("bias", bias)):
        if value:
            parts.unexplained[Node(kind, token)] = value  # type: ignore[arg-type]
    return parts


def _parts_below(frozen: FrozenPass, node: Node, direction: Any) -> Parts | None:
    """The parts of a part; None for what has none."""
    token = node.reads_at
    if node.kind == "feature":
        reading = frozen.of_feature(*node.place, token).scaled(direction)
        return parts_of(frozen, reading, token, direction * frozen.feature_bias(*node.place))
    if node.kind == "head":
        # All sources at once: the gradient is nonzero at each that the head read from.
        reading = frozen.of_head(*node.place, direction, node.token)
        return parts_of(frozen, _at_source(frozen, node, direction, reading), token)
    if node.kind == "skip":
        assert node.layer is not None
        constant = -float(direction @ frozen.transcoders[node.layer].centre.detach().to(direction.dtype))
        return parts_of(frozen, frozen.of_mlp_input(node.layer, direction, token), token, constant)
    return None


def _at_source(frozen: FrozenPass, node: Node, direction: Tensor, reading: Reading) -> Reading:
    (layer, head), source = node.place, node.reads_at
    read = frozen.values[layer][head, source] @ direction
    value = float(frozen.pattern[layer][head, node.token, source] * read)
    explained = float(reading.embedding[source] @ frozen.embedding_written[source])
    for below in range(layer):
        explained += float(reading.attention[below, source] @ frozen.attention_written[below][source])
        explained += float(reading.mlps[below, source] @ frozen.mlp_written[below][source])
    return Reading(value, reading.embedding, reading.attention, reading.mlps, value - explained)


# --- roots -----------------------------------------------------------------------------------------------------------


def _root(frozen: FrozenPass, root: Node, against: int | None) -> tuple[float, Reading, float]:
    """Value of a root, its reading, and what its value is beyond that."""
    if not 0 <= root.token < frozen.n_tokens:
        raise InputError(f"token {root.token}: the prompt has {frozen.n_tokens} tokens, 0 to {frozen.n_tokens - 1}")
    if root.kind == "feature":
        if root.layer not in frozen.transcoders:
            have = ", ".join(map(str, frozen.transcoders)) or "none"
            raise InputError(f"layer {root.layer} has no transcoder: these have one: {have}")
        n_features = frozen.transcoders[root.layer].n_features
        if root.index is None or not 0 <= root.index < n_features:
            raise InputError(f"feature {root.index}: the transcoder of layer {root.layer} has {n_features} features")
        value = frozen.value_of(root.layer, root.index, root.token)
        bias = frozen.feature_bias(root.layer, root.index)
        return value, frozen.of_feature(root.layer, root.index, root.token), bias
    if root.kind == "logit":
        model: Any = frozen.model
        head = model.get_output_embeddings()
        if head is None:
            raise InputError("the model predicts no next token, so there is no logit to explain: choose a feature")
        weight, bias_of = head.weight.detach(), getattr(head, "bias", None)
        for entry in (root.index, against):
            if entry is not None and not 0 <= entry < weight.shape[0]:
                raise InputError(f"vocabulary entry {entry}: the model has {weight.shape[0]}")
        assert root.index is not None
        # A logit means something against others only: what raises all alike changes nothing.
        direction = weight[root.index] - (weight.mean(dim=0) if against is None else weight[against])
        bias = 0.0
        if bias_of is not None:
            bias = float(bias_of[root.index] - (bias_of.mean() if against is None else bias_of[against]))
        reading = frozen.of_final(direction, root.token)
        return reading.value + bias, reading, bias
    raise InputError(f"root {root}: only a feature or a logit can be explained")


# --- the greedy search of the paper -----------------------------------------------------------------------------------


@dataclass(eq=False)
class _Path:
    nodes: tuple[Node, ...]
    value: float
    direction: Any = None


def greedy_circuit(
    model: Any,
    input_ids: Int[Tensor, " time"],
    transcoders: Mapping[int, Transcoder],
    root: Node,
    *,
    iterations: int = 2,
    branches: int = 15,
    against: int | None = None,
    rank_by: Literal["size", "value"] = "size",
    ln: LayerNorms = "exact",
    first_is_whole: bool = True,
) -> Circuit:
    """Search for the paths that contribute most to a root, and merge them to a graph.

    In each iteration every path is extended by its ``branches`` largest parts, and the ``branches`` largest of all
    extended paths go on. All prefixes of all paths that were kept make the graph; an edge that paths share counts once
    for every distinct prefix that ends with it.

    Args:
        model: a causal `LanguageModel` or transformers model.
        input_ids: the prompt.
        transcoders: by layer.
        root: a ``feature`` or ``logit`` node.
        iterations: steps away from the root.
        branches: paths kept in each.
        against: for a logit, the vocabulary entry to subtract; default the mean of all.
        rank_by: ``size``, so that inhibition counts as well, or ``value``.
        ln: see ``FrozenPass``.
        first_is_whole: see ``FrozenPass``.

    Raises:
        InputError: a root that does not exist or does not fire; numbers below 1; see also ``FrozenPass``.
    """
    for name, number in (("iterations", iterations), ("branches", branches)):
        if number < 1:
            raise InputError(f"{name}={number}: must be at least 1")
    frozen = FrozenPass(model, input_ids, transcoders, ln=ln, first_is_whole=first_is_whole)
    value, reading, bias = _root(frozen, root, against)
    opened: dict[tuple[Node, ...], Parts] = {(root,): parts_of(frozen, reading, root.token, bias)}
    prefixes: dict[tuple[Node, ...], float] = {(root,): value}
    paths = [_Path((root,), value)]
    for _ in range(iterations):
        found: list[_Path] = []
        for path in paths:
            parts = opened.get(path.nodes) or _parts_below(frozen, path.nodes[-1], path.direction)
            if parts is None:
                continue
            opened[path.nodes] = parts
            found += [
                _Path((*path.nodes, node), share, parts.directions.get(node))
                for node, share in _largest(parts.candidates, branches, rank_by)
            ]
        paths = sorted(found, key=lambda each: -_rank(each.value, rank_by))[:branches]
        prefixes |= {path.nodes: path.value for path in paths}
    method = {
        "name": "greedy",
        "iterations": iterations,
        "branches": branches,
        "against": against,
        "rank_by": rank_by,
        "ln": ln,
    }
    return _merged(frozen, root, prefixes, opened, method)


def _rank(value: float, rank_by: str) -> float:
    return abs(value) if rank_by == "size" else value


def _largest(shares: Mapping[Node, float], count: int, rank_by: str) -> list[tuple[Node, float]]:
    return sorted(shares.items(), key=lambda each: -_rank(each[1], rank_by))[:count]


def _merged(
    frozen: FrozenPass,
    root: Node,
    prefixes: Mapping[tuple[Node, ...], float],
    opened: Mapping[tuple[Node, ...], Parts],
    method: dict[str, Any],
) -> Circuit:
    """The graph of all prefixes. A node is taken apart where one of its prefixes goes on (the rest of it is pruned)."""
    nodes: dict[Node, Figures] = {}
    edges: dict[tuple[Node, Node], float] = {}

    def add(child: Node, parent: Node, value: float) -> None:
        nodes.setdefault(child, Figures()).value += value
        edges[child, parent] = edges.get((child, parent), 0.0) + value

    nodes[root] = Figures(value=prefixes[(root,)])
    for path, value in prefixes.items():
        if len(path) > 1:
            add(path[-1], path[-2], value)
    going_on: dict[tuple[Node, ...], set[Node]] = {}
    for path in prefixes:
        if len(path) > 1:
            going_on.setdefault(path[:-1], set()).add(path[-1])
    apart = {path[-1] for path in going_on}
    for path, value in prefixes.items():
        node = path[-1]
        if node not in apart:
            continue
        figures = nodes[node]
        figures.expanded = True
        if path not in going_on:
            figures.pruned += value
            continue
        parts, kept = opened[path], going_on[path]
        figures.pruned += sum(share for child, share in parts.candidates.items() if child not in kept)
        for child, share in parts.unexplained.items():
            add(child, node, share)
    for node, figures in nodes.items():
        if node.kind == "feature":
            figures.activation = frozen.value_of(*node.place, node.token)
    return Circuit(root, nodes, edges, frozen.input_ids.tolist(), method)


# --- influence, as circuit-tracer ------------------------------------------------------------------------------------


def influence_circuit(
    model: Any,
    input_ids: Int[Tensor, " time"],
    transcoders: Mapping[int, Transcoder],
    root: Node,
    *,
    node_share: float = 0.8,
    edge_share: float = 0.98,
    max_features: int = 256,
    against: int | None = None,
    ln: LayerNorms = "exact",
    first_is_whole: bool = True,
) -> Circuit:
    """Keep the nodes, then the edges, that cover most of the influence on a root.

    Influence is what circuit-tracer takes: rows of sizes of contributions normalised to 1, summed over paths of all
    lengths. Features are taken apart in the order of their influence so far, at most ``max_features`` of them; paths
    end at the others, and at skip paths.

    Args:
        model: see ``greedy_circuit``.
        input_ids: see ``greedy_circuit``.
        transcoders: see ``greedy_circuit``.
        root: see ``greedy_circuit``.
        node_share: share of the influence that the kept nodes cover.
        edge_share: share of the influence between them that the kept edges cover.
        max_features: to take apart.
        against: see ``greedy_circuit``.
        ln: see ``FrozenPass``.
        first_is_whole: see ``FrozenPass``.

    Raises:
        InputError: shares outside (0, 1]; see also ``greedy_circuit``.
    """
    for name, share in (("node_share", node_share), ("edge_share", edge_share)):
        if not 0 < share <= 1:
            raise InputError(f"{name}={share}: a share above 0, at most 1")
    if max_features < 1:
        raise InputError(f"max_features={max_features}: must be at least 1")
    frozen = FrozenPass(model, input_ids, transcoders, attention="through", ln=ln, first_is_whole=first_is_whole)
    value, reading, bias = _root(frozen, root, against)
    sources = _Sources(frozen)
    rows: dict[int, Tensor] = {}  # by source number; the root's row apart
    values = {root: value}
    biases = {root: bias + reading.constant + sources.bias(reading)}
    root_row = sources.shares(reading)
    while True:
        influence = _influence(root_row, rows)
        open_ones = [place for place in influence.argsort(descending=True).tolist() if place < sources.n_features]
        chosen = [place for place in open_ones if place not in rows and influence[place] > 0][:16]
        if not chosen or len(rows) >= max_features:
            break
        for place in chosen[: max_features - len(rows)]:
            node = sources.nodes[place]
            layer, feature = node.place
            below = frozen.of_feature(layer, feature, node.token)
            rows[place] = sources.shares(below)
            values[node] = float(sources.activations[place])
            biases[node] = frozen.feature_bias(layer, feature) + below.constant + sources.bias(below)
    kept = _covering(influence, node_share)
    edges = _edges(sources, root, root_row, rows, influence, kept, edge_share)
    nodes = {root: Figures(value=value)}
    for child, _ in edges:
        place = sources.place[child]
        activation = float(sources.activations[place]) if place < sources.n_features else None
        shown = activation if activation is not None else float(influence[place])
        nodes[child] = Figures(value=shown, activation=activation, influence=float(influence[place]))
    nodes[root].influence = 1.0
    if root.kind == "feature":
        nodes[root].activation = value
    for parent in {parent for _, parent in edges}:
        if biases[parent]:
            node = Node("bias", parent.token)
            nodes.setdefault(node, Figures())
            edges[node, parent] = biases[parent]
        figures = nodes[parent]
        figures.expanded = True
        figures.pruned = values[parent] - sum(share for (_, to), share in edges.items() if to == parent)
    method = {
        "name": "influence",
        "node_share": node_share,
        "edge_share": edge_share,
        "taken apart": len(rows),
        "against": against,
        "ln": ln,
    }
    return Circuit(root, nodes, edges, frozen.input_ids.tolist(), method)


class _Sources:
    """All that readings through attention are sums of: first the features that fire, then what is not coded."""

    def __init__(self, frozen: FrozenPass) -> None:
        self.frozen = frozen
        self.nodes: list[Node] = []
        activations = [torch.zeros(0)]
        for layer, firing in frozen.firing.items():
            pairs = zip(firing.tokens.tolist(), firing.features.tolist(), strict=True)
            self.nodes += [Node("feature", token, layer, feature) for token, feature in pairs]
            activations.append(firing.values)
        self.activations = torch.cat([each.to(frozen.embedding_written.dtype) for each in activations])
        self.n_features = len(self.nodes)
        self._written: list[tuple[int | None, Tensor]] = [(None, frozen.embedding_written)]
        self.nodes += [Node("embedding", token) for token in range(frozen.n_tokens)]
        for kind, found in (("error", frozen.errors), ("mlp", frozen.whole), ("skip", frozen.skips)):
            for layer, written in found.items():
                self._written.append((layer, written))
                self.nodes += [Node(kind, token, layer) for token in range(frozen.n_tokens)]  # type: ignore[arg-type]
        self.place = {node: place for place, node in enumerate(self.nodes)}

    def shares(self, reading: Reading) -> Float[Tensor, " sources"]:
        """What each contributes to a reading."""
        frozen, shares = self.frozen, []
        for layer, firing in frozen.firing.items():
            rows = frozen.transcoders[layer].decoder_weight.detach()[firing.features].to(reading.mlps.dtype)
            shares.append((rows * reading.mlps[layer][firing.tokens]).sum(dim=1) * firing.values)
        for layer_or_none, written in self._written:
            weights = reading.embedding if layer_or_none is None else reading.mlps[layer_or_none]
            shares.append((weights * written).sum(dim=1))
        return torch.cat(shares)

    def bias(self, reading: Reading) -> float:
        """What the output biases of transcoders contribute."""
        total = 0.0
        for layer, transcoder in self.frozen.transcoders.items():
            coded = ~self.frozen.whole[layer].any(dim=1)
            total += float((reading.mlps[layer][coded] @ transcoder.decoder_bias.detach().to(reading.mlps.dtype)).sum())
        return total


def _normalised(row: Tensor) -> Tensor:
    return row.abs() / row.abs().sum().clamp(min=1e-30)


def _influence(root_row: Tensor, rows: Mapping[int, Tensor]) -> Float[Tensor, " sources"]:
    """``root (A + A^2 + ...)``: the graph has no cycles, so the series ends."""
    total = step = _normalised(root_row)
    places = list(rows)
    if not places:
        return total
    matrix = torch.stack([_normalised(rows[place]) for place in places])
    while bool((step := step[places] @ matrix).any()):
        total = total + step
    return total


def _covering(influence: Tensor, share: float) -> set[int]:
    """The fewest places that hold this share of all influence."""
    ordered = influence.sort(descending=True)
    before = ordered.values.cumsum(0) - ordered.values
    wanted = (before < share * influence.sum() * (1 - 1e-9)) & (ordered.values > 0)
    return set(ordered.indices[wanted].tolist())


def _edges(
    sources: _Sources,
    root: Node,
    root_row: Tensor,
    rows: Mapping[int, Tensor],
    influence: Tensor,
    kept: set[int],
    share: float,
) -> dict[tuple[Node, Node], float]:
    """The edges between kept nodes that cover a share of the influence between them and reach the root."""
    inside = sorted(kept)
    found: list[tuple[float, int, Node, float]] = []
    for parent, row, weight in [(root, root_row, 1.0)] + [
        (sources.nodes[place], rows[place], float(influence[place])) for place in inside if place in rows
    ]:
        within = row[inside]
        scores = weight * _normalised(within)
        found += [
            (score, place, parent, value)
            for score, place, value in zip(scores.tolist(), inside, within.tolist(), strict=True)
            if score > 0
        ]
    found.sort(key=lambda each: -each[0])
    total, covered, edges = sum(each[0] for each in found), 0.0, {}
    for score, place, parent, value in found:
        if covered >= share * total * (1 - 1e-9):
            break
        edges[sources.nodes[place], parent] = value
        covered += score
    reached = {root}
    while True:
        more = {child for child, parent in edges if parent in reached} - reached
        if not more:
            return {(child, parent): value for (child, parent), value in edges.items() if parent in reached}
        reached |= more
