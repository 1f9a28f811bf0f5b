"""Recursive direct feature attribution: following a feature's value back to heads, positions and upstream features.

Source: section 4 of Kissane et al. 2024 (arXiv 2406.17759). A node is a number that is part of the feature at the root;
its children are the parts of that number, and add up to it. Patterns and norm scales are those of the one forward pass
(`DirectPaths`) at every level, so the tree is linear all the way down: a decomposition, not a causal statement.

| kind of node | what it is |
|---|---|
| ``feature`` | a feature's value, as far as it reaches the root |
| ``attention`` | a layer's heads at a token, where no dictionary takes them apart |
| ``source`` | what the heads bring from one token |
| ``embedding``, ``mlp`` | what these wrote, as wholes; they have no parts |
| ``dictionary bias``, ``error`` | what a dictionary adds whatever fires, and what it misses |
| ``model bias`` | biases of the model between what was written and what is read |
| ``remainder`` | of `rdfa`: the parts that were not shown |

The parts of a feature of a layer's heads are its dictionary's bias and sources; those of a feature of the stream its
dictionary's bias and components; those of a layer's heads sources; those of a source the features of the stream's
dictionary, its bias and its error, or else components.
"Components" are the embedding, each earlier layer's heads (by the features of their dictionary where there is one) and
each earlier MLP. Nothing is left out and nothing is defined as the rest, so what the children miss is rounding.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.errors import InputError
from apportion.features.attention_output_sae import Reader, check_feature
from apportion.features.dictionary import SparseAutoencoder
from apportion.models import Site
from apportion.models.direct_paths import READABLE, DirectPaths, Pullback, stream_before

Kind = Literal[
    "feature", "attention", "source", "embedding", "mlp", "dictionary bias", "model bias", "error", "remainder"
]


@dataclass(eq=False)
class Node:
    """A part of the feature at the root.

    Attributes:
        kind: see the module's docstring.
        value: how much of the root it is.
        layer: the block it belongs to; of a source the block whose heads look at it.
        position: the token at which it lies.
        site: of a feature, its dictionary's.
        feature: its number.
        activation: of a feature, its own value there.
        table: of what heads output, the value by head and source.
        count: of a remainder, how many children it stands for.
    """

    kind: Kind
    value: float
    layer: int | None = None
    position: int | None = None
    site: Site | None = None
    feature: int | None = None
    activation: float | None = None
    table: Float[Tensor, "heads sources"] | None = None
    count: int = 1
    _grow: Callable[[], "list[Node]"] | None = field(default=None, repr=False)

    @property
    def expandable(self) -> bool:
        """Whether it has parts."""
        return self._grow is not None

    @cached_property
    def children(self) -> "list[Node]":
        """Its parts, largest first; they add up to its value, to rounding."""
        grown = [] if self._grow is None else self._grow()
        return sorted(grown, key=lambda node: -abs(node.value))

    @property
    def rounding(self) -> float:
        """What the children miss of the value, relative to the sum of their sizes; 0 without children."""
        sizes = sum(abs(child.value) for child in self.children)
        return abs(self.value - sum(child.value for child in self.children)) / sizes if sizes else 0.0


@dataclass(frozen=True, eq=False)
class Tree:
    """A node and the parts of it that were followed; the others are in a ``remainder`` among them."""

    node: Node
    branches: tuple["Tree", ...] = ()

    def __iter__(self) -> Iterator["Tree"]:
        """This tree and all below it."""
        yield self
        for branch in self.branches:
            yield from branch


class RecursiveAttribution:
    """Attributions of one prompt.

    Args:
        paths: the forward pass.
        dictionaries: by the site of each. Those of a layer's heads (``layers.L.heads``) take that layer's part apart;
            one of the stream before a layer (``layers.L-1.residual`` or ``embeddings``) takes apart what that layer's
            heads bring from a token.

    Raises:
        InputError: a dictionary of a site that cannot be followed, or of another width than its site.
    """

    def __init__(self, paths: DirectPaths, dictionaries: Mapping[Site, SparseAutoencoder]) -> None:
        self.paths = paths
        self.dictionaries = dict(dictionaries)
        self._fires: dict[tuple[Site, int], list[int]] = {}
        self._readers: dict[tuple[Site, int], Reader] = {}
        self._activations: dict[tuple[Site, int, int], float] = {}
        for site, sae in self.dictionaries.items():
            check_site(site)
            width = paths.activations(site).shape[1]
            if sae.d_in != width or sae.d_out != width:
                raise InputError(
                    f"the dictionary for {site} maps width {sae.d_in} to {sae.d_out}, but the site has width {width}: "
                    "give one that was trained there"
                )

    def features_at(self, site: Site, position: int) -> list[tuple[int, float]]:
        """The features of a dictionary that fire at a token, and their values, strongest first."""
        values = {feature: self._activation(site, feature, position) for feature in self._at(site, position)}
        return sorted(values.items(), key=lambda each: -each[1])

    def root(self, site: Site, feature: int, position: int) -> Node:
        """A feature's pre-activation at a token, whether or not it fires there.

        Raises:
            InputError: no dictionary for the site, no such feature or token.
        """
        if site not in self.dictionaries:
            given = ", ".join(str(each) for each in self.dictionaries) or "none"
            raise InputError(f"site {site}: there is no dictionary for it; given: {given}")
        check_feature(self.dictionaries[site], feature)
        if not 0 <= position < self.paths.n_tokens:
            raise InputError(f"position={position}: the prompt has tokens 0 to {self.paths.n_tokens - 1}")
        return self._feature(site, feature, position, 1.0)

    # --- nodes ---------------------------------------------------------------------------------------------------

    def _feature(self, site: Site, feature: int, position: int, scale: float) -> Node:
        """A feature's value, times what one unit of it is worth at the root."""
        reader, activation = self._reader(site, feature), self._activation(site, feature, position)
        bias = Node("dictionary bias", scale * float(reader.bias), site.layer, position, site)
        table = None
        if site.kind == "heads":
            assert site.layer is not None
            layer, direction = site.layer, reader.weight * scale
            table = self._table(layer, position, direction)

            def grow() -> list[Node]:
                return [bias, *self._sources(layer, position, direction)]
        else:

            def grow() -> list[Node]:
                cotangent = torch.zeros_like(self.paths.activations(site))
                cotangent[position] = reader.weight * scale
                return [bias, *self._components(self.paths.through(site, cotangent), position)]

        return Node("feature", scale * activation, site.layer, position, site, feature, activation, table, _grow=grow)

    def _table(self, layer: int, position: int, direction: Tensor) -> Float[Tensor, "heads sources"]:
        by_head = direction.view(self.paths.n_heads(layer), -1, 1)
        return self.paths.patterns[layer][:, position] * (self.paths.attention(layer, "values") @ by_head).squeeze(2)

    def _sources(self, layer: int, position: int, direction: Tensor) -> list[Node]:
        table = self._table(layer, position, direction)
        seen = self.paths.patterns[layer][:, position].gt(0).any(dim=0).nonzero().flatten().tolist()

        def growing(source: int) -> Callable[[], list[Node]]:
            return lambda: self._from_source(layer, position, source, direction)

        return [
            Node(
                "source",
                float(table[:, source].double().sum()),
                layer,
                source,
                table=table[:, source, None],
                _grow=growing(source),
            )
            for source in seen
        ]

    def _from_source(self, layer: int, position: int, source: int, direction: Tensor) -> list[Node]:
        """What the heads of a layer bring from one token, by what that token's stream is made of."""
        values = self.paths.attention(layer, "values")
        cotangent = torch.zeros_like(values)
        pattern = self.paths.patterns[layer][:, position, source]
        cotangent[:, source] = pattern[:, None] * direction.view(len(values), -1)
        stream = stream_before(layer)
        if stream not in self.dictionaries:
            return self._components(self.paths.through_attention(layer, "values", cotangent), source)
        gradient, constant = self.paths.to_stream(layer, "values", cotangent)
        return [*self._by_dictionary(stream, source, gradient[source]), Node("model bias", constant, layer, source)]

    def _components(self, pullback: Pullback, position: int) -> list[Node]:
        paths = self.paths
        nodes = [Node("embedding", _dot(pullback.embeddings[position], paths.embeddings[position]), None, position)]
        for layer, gradients in pullback.heads.items():
            gradient, site = gradients[position], Site(layer, "heads")
            if site in self.dictionaries:
                nodes += self._by_dictionary(site, position, gradient)
            else:
                nodes.append(self._attention(layer, position, gradient))
        for layer, gradients in pullback.mlps.items():
            nodes.append(Node("mlp", _dot(gradients[position], paths.mlps[layer][position]), layer, position))
        return [*nodes, Node("model bias", pullback.constant, None, position)]

    def _attention(self, layer: int, position: int, gradient: Tensor) -> Node:
        return Node(
            "attention",
            _dot(gradient, self.paths.heads[layer][position]),
            layer,
            position,
            table=self._table(layer, position, gradient),
            _grow=lambda: self._sources(layer, position, gradient),
        )

    def _by_dictionary(self, site: Site, position: int, gradient: Tensor) -> list[Node]:
        """What a gradient makes of the activations at a token: by features, the dictionary's bias, and its error."""
        sae = self.dictionaries[site]
        firing = self._at(site, position)
        directions = (sae.decoder_weight.detach()[firing] / sae.input_scale).to(gradient)
        bias = (sae.decoder_bias.detach() / sae.input_scale).to(gradient)
        worth = directions.double() @ gradient.double()
        nodes = [self._feature(site, f, position, each) for f, each in zip(firing, worth.tolist(), strict=True)]
        activations = torch.tensor([node.activation for node in nodes], dtype=torch.float64)
        error = self.paths.activations(site)[position].double() - bias.double()
        error = error - activations.to(error) @ directions.double()
        return [
            *nodes,
            Node("dictionary bias", _dot(bias, gradient), site.layer, position, site),
            Node("error", _dot(error, gradient), site.layer, position, site),
        ]

    # --- activations -----------------------------------------------------------------------------------------------

    def _at(self, site: Site, position: int) -> list[int]:
        if (site, position) not in self._fires:
            sae = self.dictionaries[site]
            with torch.no_grad():
                codes = sae.encode(self.paths.activations(site).to(sae.encoder_weight), mode="threshold")
            by_row = codes.col_indices.split(codes.winners_per_row().tolist())
            for row, features in enumerate(by_row):
                self._fires[site, row] = features.tolist()
        return self._fires[site, position]

    def _reader(self, site: Site, feature: int) -> Reader:
        if (site, feature) not in self._readers:
            reader, like = Reader.of(self.dictionaries[site], feature), self.paths.embeddings
            self._readers[site, feature] = Reader(reader.weight.to(like), reader.bias.to(like))
        return self._readers[site, feature]

    def _activation(self, site: Site, feature: int, position: int) -> float:
        if (site, feature, position) not in self._activations:
            reader, x = self._reader(site, feature), self.paths.activations(site)[position]
            self._activations[site, feature, position] = _dot(x, reader.weight) + float(reader.bias)
        return self._activations[site, feature, position]


def check_site(site: Site) -> None:
    """Make sure that features of a site can be followed.

    Raises:
        InputError: they cannot; says why.
    """
    if site.kind not in ("heads", *READABLE):
        raise InputError(
            f"site {site}: an MLP's output is no linear function of what was written before it, so its features cannot "
            f"be followed; give a dictionary of heads, {', '.join(each for each in READABLE if each != 'embeddings')}"
        )


def rdfa(node: Node, depth: int = 2, top_k: int = 5) -> Tree:
    """Follow the largest parts of a node, and the largest parts of those, and so on.

    Args:
        node: such as `RecursiveAttribution.root`.
        depth: levels below it.
        top_k: parts to follow at each level. Biases and errors are always shown, and what is not, in a ``remainder``.

    Raises:
        InputError: a negative depth, or no part to follow.
    """
    if depth < 0 or top_k < 1:
        raise InputError(f"depth={depth}, top_k={top_k}: depth must be at least 0 and top_k at least 1")
    if depth == 0 or not node.expandable:
        return Tree(node)
    followed = [child for child in node.children if not _always_shown(child)][:top_k]
    shown = [child for child in node.children if child in followed or _always_shown(child)]
    rest = [child for child in node.children if child not in shown]
    branches = [rdfa(child, depth - 1, top_k) for child in shown]
    if rest:
        left = Node("remainder", sum(child.value for child in rest), node.layer, node.position, count=len(rest))
        branches.append(Tree(left))
    return Tree(node, tuple(branches))


def _always_shown(node: Node) -> bool:
    return node.kind in ("dictionary bias", "model bias", "error")


def _dot(one: Tensor, other: Tensor) -> float:
    return float(one.double() @ other.double())
