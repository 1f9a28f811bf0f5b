"""A circuit as a picture: layers from bottom to top, tokens from left to right, in one HTML file without a network.

A node's area is the size of its value, an edge's width what it contributes, its colour the sign. What a circuit does
not explain (transcoder errors, MLPs without a transcoder, biases) is drawn hollow, and its share is stated beside the
picture. The page is as safe as the feature browser's, see `html.py`; what corpus and vocabulary say is escaped.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from apportion.data.files import write_atomically
from apportion.features.transcoder_circuits import Circuit, Node
from apportion.report.html import page_policy, page_version, read_templates, template
from apportion.report.payload import readable

_CELL, _ROW, _LEFT, _TOP = 34.0, 64.0, 128.0, 34.0
_CHARACTER = 7.3
_AT_LEAST = 760.0
_LARGEST, _SMALLEST = 14.0, 3.0
_HOLLOW = ("error", "mlp", "bias")
_NAMES = {
    "error": "transcoder error",
    "mlp": "MLP without a transcoder",
    "bias": "biases",
    "embedding": "embedding",
    "logit": "logit",
}


@dataclass(frozen=True)
class FeatureNote:
    """What a feature means by its weights: tokens that it promotes, and that excite it directly, best first."""

    promotes: Sequence[str] = ()
    excited_by: Sequence[str] = ()


def write_circuit(
    path: Path | str,
    circuit: Circuit,
    tokens: Sequence[str],
    *,
    title: str,
    summary: Mapping[str, str | int | float] | None = None,
    notes: Mapping[tuple[int, int], FeatureNote] | None = None,
    vocabulary: Mapping[int, str] | None = None,
) -> Path:
    """Write the picture of a circuit, whole or not at all.

    Args:
        path: of the HTML file.
        circuit: what to draw.
        tokens: texts of the prompt's tokens.
        title: heading.
        summary: facts shown below it.
        notes: what features mean, by layer and feature.
        vocabulary: texts of the vocabulary entries that are logits in the circuit.

    Raises:
        InputError: the folder cannot be written or the disk is full.
        ValueError: another number of tokens than the circuit has.
    """
    if len(tokens) != len(circuit.input_ids):
        raise ValueError(f"{len(tokens)} tokens for a circuit of {len(circuit.input_ids)}: give one text for each")
    path = Path(path)
    shown = [visible(each) for each in tokens]
    style, script = read_templates(["report.css", "circuit.css"]), read_templates(["circuit.js"])
    drawing = Drawing(circuit, shown, vocabulary or {})
    page = template("circuit.html.j2").render(
        title=readable(title),
        policy=page_policy(script, style),
        style=style,
        script=script,
        summary=[(readable(str(name)), readable(_fact(value))) for name, value in (summary or {}).items()],
        shares=unexplained(circuit),
        svg=readable(drawing.svg()),
        data=_data(circuit, drawing, notes or {}),
        n_nodes=len(circuit.nodes),
        n_edges=len(circuit.edges),
        influence=circuit.method.get("name") == "influence",
        version=page_version(),
    )
    with write_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return path


def visible(text: str) -> str:
    """A token's text on one line, with spaces at its ends that can be seen."""
    text = readable(text).replace("\n", "↵").replace("\t", "→")
    core = text.strip(" ")
    if not core:
        return "␣" * max(1, len(text))
    lead, tail = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    return "␣" * (lead > 0) + core + "␣" * (tail > 0)


def unexplained(circuit: Circuit) -> list[tuple[str, str]]:
    """Of what feeds the root: how much is parts that were kept, what is not explained, and what was pruned."""
    into = circuit.into(circuit.root)
    sums = {"kept parts": 0.0, "transcoder error": 0.0, "MLPs without a transcoder": 0.0, "biases": 0.0}
    of = {"error": "transcoder error", "mlp": "MLPs without a transcoder", "bias": "biases"}
    for node, value in into.items():
        sums[of.get(node.kind, "kept parts")] += value
    sums["pruned"] = circuit.nodes[circuit.root].pruned
    return [(name, f"{value:+.3g}") for name, value in sums.items()]


class Drawing:
    """Where everything goes."""

    def __init__(self, circuit: Circuit, tokens: Sequence[str], vocabulary: Mapping[int, str]) -> None:
        self.circuit, self.tokens, self.vocabulary = circuit, tokens, vocabulary
        self.nodes = [circuit.root, *(node for node in circuit.nodes if node != circuit.root)]
        self.number = {node: place for place, node in enumerate(self.nodes)}
        levels = sorted({self._level(node) for node in self.nodes} | {(-1, 0)})
        self.rows = {level: place for place, level in enumerate(levels)}
        cells: dict[tuple[int, int], list[Node]] = {}
        for node in self.nodes:
            cells.setdefault((self.rows[self._level(node)], node.token), []).append(node)
        for inside in cells.values():
            inside.sort(key=lambda node: -abs(circuit.nodes[node].value))
        widths = [max(30.0, _CHARACTER * len(text) + 14) for text in tokens]
        for (_, token), inside in cells.items():
            widths[token] = max(widths[token], _CELL * len(inside))
        # A short prompt need not be a narrow picture.
        spare = max(0.0, _AT_LEAST - sum(widths)) / len(widths)
        widths = [width + spare for width in widths]
        self.left = [_LEFT + sum(widths[:place]) for place in range(len(widths) + 1)]
        self.width, self.height = self.left[-1] + 20, _TOP + _ROW * len(levels) + 34
        self.place: dict[Node, tuple[float, float]] = {}
        for (row, token), inside in cells.items():
            middle = (self.left[token] + self.left[token + 1]) / 2
            for place, node in enumerate(inside):
                self.place[node] = (middle + _CELL * (place - (len(inside) - 1) / 2), self._y(row))

    def _y(self, row: int) -> float:
        return self.height - 44 - _ROW * (row + 0.5) + 10

    def _level(self, node: Node) -> tuple[float, int]:
        """From bottom to top: embeddings, what is not explained, then layer by layer heads and features, the logit."""
        if node.kind == "embedding":
            return (-1, 0)
        if node.kind == "logit":
            return (math.inf, 0)
        if node.layer is None:
            return (-1, 1)
        return (node.layer, 0 if node.kind == "head" else 1)

    def name(self, node: Node) -> str:
        """What a node is, in words."""
        at = f"{node.token}: {self.tokens[node.token]}"
        if node.kind == "feature":
            return f"feature {node.index} of layer {node.layer}, at {at}"
        if node.kind == "head":
            source = f"{node.source}: {self.tokens[node.reads_at]}"
            return f"layer {node.layer} head {node.index}, from {source} to {at}"
        if node.kind == "skip":
            return f"skip path of layer {node.layer}, at {at}"
        if node.kind == "logit":
            entry = self.vocabulary.get(node.index or 0, f"token {node.index}")
            return f"logit of {visible(entry)} after {at}"
        return f"{_NAMES[node.kind]}{'' if node.layer is None else f' of layer {node.layer}'}, at {at}"

    def svg(self) -> str:
        """The drawing; every text in it is escaped."""
        parts = [f'<svg viewBox="0 0 {self.width:.0f} {self.height:.0f}" width="{self.width:.0f}" role="img">']
        parts += [self._grid(), '<g class="edges">']
        largest = max((abs(value) for value in self.circuit.edges.values()), default=1.0) or 1.0
        for (child, parent), value in sorted(self.circuit.edges.items(), key=lambda each: abs(each[1])):
            parts.append(self._edge(child, parent, value, abs(value) / largest))
        parts.append('</g><g class="nodes">')
        sizes = {node: self._size(node) for node in self.nodes}
        largest = max((size for node, size in sizes.items() if node != self.circuit.root), default=1.0) or 1.0
        parts += [self._node(node, min(1.0, sizes[node] / largest)) for node in self.nodes]
        return "".join([*parts, "</g></svg>"])

    def _size(self, node: Node) -> float:
        """What areas are by: influence where it is known, since values of features and embeddings are no one unit."""
        figures = self.circuit.nodes[node]
        return abs(figures.value) if figures.influence is None else figures.influence

    def _grid(self) -> str:
        parts = []
        for (layer, part), row in self.rows.items():
            y = self._y(row)
            if layer == -1:
                label = "embeddings" if part == 0 else "not explained"
            elif layer == math.inf:
                label = "logit"
            else:
                label = f"layer {int(layer)} " + ("heads" if part == 0 else "MLP")
            parts.append(f'<text class="level" x="14" y="{y + 4:.1f}">{label}</text>')
            parts.append(f'<path class="grid" d="M{_LEFT - 12:.1f} {y:.1f}H{self.width - 12:.1f}"/>')
        for place, text in enumerate(self.tokens):
            middle = (self.left[place] + self.left[place + 1]) / 2
            parts.append(f'<text class="token" x="{middle:.1f}" y="{self.height - 24:.1f}">{escape(text)}</text>')
            parts.append(f'<text class="position" x="{middle:.1f}" y="{self.height - 8:.1f}">{place}</text>')
        return "".join(parts)

    def _edge(self, child: Node, parent: Node, value: float, share: float) -> str:
        (x0, y0), (x1, y1) = self.place[child], self.place[parent]
        bend = max(24.0, abs(y0 - y1) * 0.45)
        path = f"M{x0:.1f} {y0:.1f}C{x0:.1f} {y0 - bend:.1f} {x1:.1f} {y1 + bend:.1f} {x1:.1f} {y1:.1f}"
        sign = "plus" if value >= 0 else "minus"
        return (
            f'<path class="edge {sign}" d="{path}" stroke-width="{0.5 + 7 * share:.2f}" '
            f'stroke-opacity="{0.22 + 0.6 * math.sqrt(share):.2f}" data-child="{self.number[child]}" '
            f'data-parent="{self.number[parent]}"/>'
        )

    def _node(self, node: Node, share: float) -> str:
        x, y = self.place[node]
        r = _LARGEST if node == self.circuit.root else max(_SMALLEST, _LARGEST * math.sqrt(share))
        sign = "plus" if self.circuit.nodes[node].value >= 0 else "minus"
        root = " root" if node == self.circuit.root else ""
        kind = f'class="node {node.kind} {sign}{root}" data-node="{self.number[node]}" tabindex="0"'
        title = f"<title>{escape(readable(self.name(node)))}</title>"
        if node.kind in ("head", "embedding", "mlp"):
            half = r * 0.886  # as large as the circle
            corner = {"head": half * 0.35}.get(node.kind, 0.0)
            box = f'x="{x - half:.1f}" y="{y - half:.1f}" width="{2 * half:.1f}" height="{2 * half:.1f}"'
            return f'<rect {kind} {box} rx="{corner:.1f}">{title}</rect>'
        if node.kind in ("error", "bias"):
            wide = r * 1.2533
            return (
                f'<path {kind} d="M{x - wide:.1f} {y:.1f}L{x:.1f} {y - wide:.1f}L{x + wide:.1f} {y:.1f}'
                f'L{x:.1f} {y + wide:.1f}Z">{title}</path>'
            )
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}">{title}</circle>'


def _data(circuit: Circuit, drawing: Drawing, notes: Mapping[tuple[int, int], FeatureNote]) -> str:
    """What the page's script shows, as JSON in which nothing can end the element that it is in."""
    nodes = []
    for node in drawing.nodes:
        figures = circuit.nodes[node]
        note = notes.get(node.place, FeatureNote()) if node.kind == "feature" else FeatureNote()
        nodes.append(
            {
                "name": readable(drawing.name(node)),
                "value": figures.value,
                "activation": figures.activation,
                "influence": figures.influence,
                "pruned": figures.pruned if figures.expanded else None,
                "promotes": [visible(text) for text in note.promotes],
                "excited": [visible(text) for text in note.excited_by],
            }
        )
    edges = [[drawing.number[child], drawing.number[parent], value] for (child, parent), value in circuit.edges.items()]
    content: Any = {"nodes": nodes, "edges": edges, "ending": circuit.method.get("name", "")}
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _fact(value: str | int | float) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
