"""One HTML page that puts two dictionaries side by side: how alike they are, matched features, features alone.

The page is whole in itself: no script, no font, no request. Every text in it, from a corpus or a file name, goes
through the template's escaping; its Content-Security-Policy allows its own style sheet and nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apportion.data.files import write_atomically
from apportion.features.contexts import FeatureContexts
from apportion.features.similarity import SHARED_AT, BestMatches, Matching, PairActivations
from apportion.report.charts import Chart, similarity_chart
from apportion.report.html import page_policy, read_templates, template
from apportion.report.payload import readable

# Bands of cosine that pairs are shown from: the likest, those that barely are partners, and what lies between.
_BANDS = ((0.9, 1.01), (SHARED_AT, 0.9), (0.4, SHARED_AT), (-1.01, 0.4))
_SHADES = 8


@dataclass(frozen=True)
class Side:
    """One of the two dictionaries.

    Attributes:
        name: what the page calls it.
        summary: facts of it, shown in order.
        contexts: what its features fire on, see `collect_contexts`; None leaves examples out.
        best: for each of its features the most similar direction of the other dictionary.
        labels: what features are called.
    """

    name: str
    summary: Mapping[str, str | int | float]
    contexts: FeatureContexts | None
    best: BestMatches
    labels: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Everything the page shows.

    Attributes:
        title: its heading.
        a, b: the two dictionaries.
        matching: one-to-one, by direction.
        activations: of the pairs, if both were run on the same tokens.
        token_text: the text of every token id in the contexts.
        notes: what a reader must know, shown above the tables.
    """

    title: str
    a: Side
    b: Side
    matching: Matching
    activations: PairActivations | None = None
    token_text: Mapping[int, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def write_comparison(
    path: Path | str, data: Comparison, *, pairs_a_band: int = 12, alone: int = 20, examples: int = 2
) -> Path:
    """Write the page to ``path``, whole or not at all, and return the path.

    Args:
        path: of the file.
        data: what it shows.
        pairs_a_band: matched pairs to show from each band of cosine.
        alone: features without a partner to show of each dictionary, those that fire most first.
        examples: contexts to show of a feature, strongest first.

    Raises:
        InputError: the folder cannot be written or the disk is full.
    """
    path = Path(path)
    style = read_templates(["report.css", "comparison.css"])
    shown = _Shown(data, examples)
    stream = template("comparison.html.j2").stream(
        title=readable(data.title),
        policy=page_policy("", style),
        style=style,
        sides=[data.a.name, data.b.name],
        summary=[(name, *_facts(data, name)) for name in dict.fromkeys([*data.a.summary, *data.b.summary])],
        notes=[readable(note) for note in data.notes],
        figures=_figures(data),
        charts=_charts(data),
        bands=shown.bands(pairs_a_band),
        alone=[(side.name, *shown.alone(number, alone)) for number, side in enumerate((data.a, data.b))],
        has_activations=data.activations is not None,
    )
    with write_atomically(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(stream)
    return path


def _facts(data: Comparison, name: str) -> tuple[str, str]:
    def said(side: Side) -> str:
        value = side.summary.get(name, "")
        if isinstance(value, str):
            return readable(value)
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

    return said(data.a), said(data.b)


def _figures(data: Comparison) -> list[tuple[str, str, str]]:
    """The numbers of the comparison: name, value, what it says."""
    return [(name, _number(value), says) for name, value, says in comparison_figures(data)]


def comparison_figures(data: Comparison) -> list[tuple[str, float, str]]:
    """The numbers that a comparison comes down to: name, value, what it says."""
    matching = data.matching
    n_a, n_b = len(data.a.best.indices), len(data.b.best.indices)
    alone_a, alone_b = matching.alone(n_a, n_b)
    how = "the assignment of largest total" if matching.method == "hungarian" else "greedily, the most alike first"
    found: list[tuple[str, float, str]] = [
        ("pairs", len(matching.a), f"partners by decoder cosine, one to one ({how})"),
        ("shared", matching.shared(), f"pairs whose cosine is at least {SHARED_AT:g}"),
        ("shared_share_a", matching.shared() / n_a, "of the features of the first"),
        ("shared_share_b", matching.shared() / n_b, "of the features of the second"),
        ("alone_a", len(alone_a), "features of the first without a partner of that cosine"),
        ("alone_b", len(alone_b), "features of the second without one"),
        ("mean_cosine", float(matching.cosine.mean()), "mean cosine of the pairs"),
        (
            "mean_max_cosine_a",
            float(data.a.best.similarity.mean()),
            "mean over the first's features of the largest cosine in the second, partners shared",
        ),
        ("mean_max_cosine_b", float(data.b.best.similarity.mean()), "the other way about"),
    ]
    if data.activations is not None:
        kept = matching.cosine >= SHARED_AT
        for name, values, says in (
            ("correlation", data.activations.correlation, "mean correlation of the codes of shared pairs"),
            ("overlap", data.activations.overlap, "tokens on which both fire / on which either does, mean of shared"),
        ):
            found.append((f"mean_{name}", float(values[kept].mean()) if kept.any() else float("nan"), says))
    return found


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if np.isfinite(value) else "–"


def _charts(data: Comparison) -> list[Chart]:
    charts = [
        similarity_chart(
            f"Best matches of {side.name}",
            side.best.similarity,
            f"For each of its features the largest decoder cosine in {other.name}.",
        )
        for side, other in ((data.a, data.b), (data.b, data.a))
    ]
    charts.append(
        similarity_chart(
            "Partners, one to one", data.matching.cosine, f"{data.matching.shared():,} pairs reach {SHARED_AT:g}."
        )
    )
    if data.activations is not None:
        charts.append(
            similarity_chart(
                "Codes of partners",
                data.activations.correlation,
                f"Correlation over {data.activations.tokens:,} tokens.",
                x_label="correlation",
            )
        )
    return [Chart(readable(each.title), readable(each.note), readable(each.svg)) for each in charts]


def _visible(text: str) -> str:
    """A token on one line, without characters that would hide or turn the text around them about."""
    for mark, sign in (("\n", "↵"), ("\r", "␍"), ("\t", "⇥")):
        text = text.replace(mark, sign)
    return "".join(each if each == " " or each.isprintable() else f"⟨{ord(each):X}⟩" for each in text)


class _Shown:
    """Features as the template wants them."""

    def __init__(self, data: Comparison, examples: int) -> None:
        self.data, self.examples = data, examples

    def bands(self, count: int) -> list[tuple[str, int, list[dict[str, Any]]]]:
        """Pairs of every band of cosine, spread evenly over it: words, how many there are, the shown."""
        cosine = self.data.matching.cosine
        bands = []
        for low, high in _BANDS:
            inside = np.flatnonzero((cosine >= low) & (cosine < high))
            inside = inside[np.argsort(-cosine[inside], kind="stable")]
            if not len(inside):
                continue
            spread = inside[np.unique(np.linspace(0, len(inside) - 1, min(count, len(inside))).round().astype(int))]
            words = (
                f"cosine {low:g} and above" if high > 1 else f"below {high:g}" if low < -1 else f"{low:g} to {high:g}"
            )
            bands.append((words, len(inside), [self._pair(int(pair)) for pair in spread]))
        return bands

    def _pair(self, pair: int) -> dict[str, Any]:
        matching, activations = self.data.matching, self.data.activations
        return {
            "cosine": f"{matching.cosine[pair]:.2f}",
            "correlation": None if activations is None else f"{activations.correlation[pair]:.2f}",
            "overlap": None if activations is None else f"{activations.overlap[pair]:.0%}",
            "features": [
                self._feature(self.data.a, int(matching.a[pair])),
                self._feature(self.data.b, int(matching.b[pair])),
            ],
        }

    def alone(self, number: int, count: int) -> tuple[int, list[dict[str, Any]]]:
        """The features of a dictionary without a partner: how many, and those of them that fire most."""
        data = self.data
        both = data.matching.alone(len(data.a.best.indices), len(data.b.best.indices))
        side, mine = (data.a, data.b)[number], both[number]
        if side.contexts is not None:
            mine = mine[np.argsort(-side.contexts.fires[mine], kind="stable")]
            mine = mine[side.contexts.fires[mine] > 0] if bool((side.contexts.fires[mine] > 0).any()) else mine
        return len(both[number]), [
            {
                **self._feature(side, int(feature)),
                "match": int(side.best.indices[feature]),
                "cosine": f"{side.best.similarity[feature]:.2f}",
            }
            for feature in mine[:count]
        ]

    def _feature(self, side: Side, feature: int) -> dict[str, Any]:
        contexts, found = side.contexts, []
        if contexts is not None:
            for slot in range(min(self.examples, contexts.top)):
                if contexts.peak[feature, slot] >= 0:
                    found.append(self._example(contexts, feature, slot))
        return {
            "number": feature,
            "label": readable(side.labels.get(feature, "")),
            "density": "" if contexts is None else f"{contexts.density[feature]:.2%}",
            "examples": found,
        }

    def _example(self, contexts: FeatureContexts, feature: int, slot: int) -> list[tuple[str, int]]:
        """The tokens of a context, each with its shade: 0 where the feature is silent."""
        top = float(contexts.max_activation[feature]) or 1.0
        tokens = []
        for token, value in zip(contexts.token_ids[feature, slot], contexts.activations[feature, slot], strict=True):
            if token >= 0:
                shade = 0 if value <= 0 else 1 + min(_SHADES - 1, int(_SHADES * float(value) / top))
                tokens.append((_visible(readable(self.data.token_text.get(int(token), f"⟨{token}⟩"))), shade))
        return tokens


def texts_of(
    contexts: Sequence[FeatureContexts], decode_tokens: Callable[[Sequence[int]], Sequence[str]]
) -> dict[int, str]:
    """The text of every token in some contexts."""
    ids = np.unique(np.concatenate([each.token_ids.reshape(-1) for each in contexts]))
    wanted = [int(token) for token in ids if token >= 0]
    return dict(zip(wanted, decode_tokens(wanted), strict=True))
