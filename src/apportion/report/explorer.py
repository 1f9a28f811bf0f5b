"""The prompt explorer: a page on which a feature's value is followed back to heads, positions and upstream features.

`explore` takes a prompt apart and gives JSON-ready values; `write_explorer` puts some prompts into one HTML file that
opens from the disk without a network, under the same policy as a report's. What a page holds was followed beforehand,
the largest parts a few levels down; `follow` goes on from there for a page that is served by ``apportion explore
--serve``. Every number is part of the feature's value at the root; biases, errors of dictionaries and what was left out
are always among the parts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from apportion.data.files import write_atomically
from apportion.errors import InputError
from apportion.features import SparseAutoencoder
from apportion.features.attention_attribution import Node, RecursiveAttribution, check_site
from apportion.features.attention_output_sae import (
    head_shares,
    localisation,
    output_directions,
    random_attribution,
)
from apportion.features.logit_lens import logit_lens
from apportion.models import LanguageModel, Site
from apportion.models.direct_paths import DirectPaths
from apportion.models.linear import AttentionAtWork
from apportion.report.build import token_texts
from apportion.report.html import page_policy, page_version, read_templates, template
from apportion.report.payload import encode_block, readable

# Short texts in which something earlier decides what comes next: names, a repeated phrase, a fact, code.
DEFAULT_PROMPTS = (
    "When Mary and John went to the store, John gave a drink to Mary",
    "The quick silver train left the quick silver train station",
    "Paris is the capital of France. Rome is the capital of Italy.",
    "def area(width, height):\n    return width * height",
)
LONGEST_PROMPT = 128
# How many parts are followed beforehand at each level below a feature, largest first: of the strongest features of a
# token, and of the others. A page that is served follows whatever is asked for.
_DEEP, _SHALLOW = (3, 2, 1), (1,)
_FOLLOWED_DEEPLY = 3
_PARTS_SHOWN = 20
_DIRECTIONS = 64


@dataclass(eq=False)
class Explorer:
    """A model with the dictionaries that its activations are followed through.

    Args:
        lm: the model.
        site: of the dictionary whose features are explored.
        dictionaries: that one, and others of the same model to take apart what comes from upstream; by site.
        title: heading of the page.
        features_per_token: how many features of a token a page shows, strongest first.

    Raises:
        InputError: a dictionary whose features cannot be followed.
    """

    lm: LanguageModel
    site: Site
    dictionaries: Mapping[Site, SparseAutoencoder]
    title: str
    features_per_token: int = 8
    _recent: dict[str, RecursiveAttribution] = field(default_factory=dict, repr=False)
    _promoted: dict[tuple[Site, int], list[str]] = field(default_factory=dict, repr=False)
    _directions: dict[Site, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for site in self.dictionaries:
            check_site(site)
        if self.site not in self.dictionaries:
            raise InputError(f"site {self.site}: there is no dictionary for it among those given")

    def attribution(self, prompt: str) -> RecursiveAttribution:
        """The forward pass over a prompt, kept for the next questions about it.

        Raises:
            InputError: an empty prompt, or one that is too long.
        """
        if prompt not in self._recent:
            ids = self.lm.tokenizer(prompt, verbose=False)["input_ids"]
            if not 0 < len(ids) <= LONGEST_PROMPT:
                raise InputError(
                    f"prompt {readable(prompt[:40])!r} has {len(ids)} tokens: give one of 1 to {LONGEST_PROMPT}"
                )
            paths = DirectPaths(self.lm, torch.tensor(ids, device=self.lm.device))
            while len(self._recent) >= 4:
                del self._recent[next(iter(self._recent))]
            self._recent[prompt] = RecursiveAttribution(paths, self.dictionaries)
        return self._recent[prompt]

    def about(self) -> dict[str, Any]:
        """What holds for all prompts."""
        return {
            "title": readable(self.title),
            "site": str(self.site),
            "features": self.dictionaries[self.site].n_features,
            "dictionaries": [str(each) for each in self.dictionaries],
            "causal": self.lm.is_causal,
        }

    def explore(self, prompt: str) -> dict[str, Any]:
        """A prompt's tokens, the strongest features on each, and each feature's value as sums of sums.

        Raises:
            InputError: an empty prompt, or one that is too long.
        """
        attribution = self.attribution(prompt)
        tokens = [readable(each) for each in self._decode(attribution.paths.input_ids.tolist())]
        for site in self.dictionaries:
            firing = {feature for place in range(len(tokens)) for feature, _ in attribution.features_at(site, place)}
            self._learn(site, sorted(each for each in firing if (site, each) not in self._promoted))
        features = []
        for position in range(len(tokens)):
            found = attribution.features_at(self.site, position)
            shown = [
                self._feature(attribution, feature, position, _DEEP if place < _FOLLOWED_DEEPLY else _SHALLOW)
                for place, (feature, _) in enumerate(found[: self.features_per_token])
            ]
            features.append({"firing": len(found), "shown": shown})
        return {"prompt": readable(prompt), "tokens": tokens, "features": features}

    def follow(self, prompt: str, feature: int, position: int, path: Sequence[int]) -> dict[str, Any]:
        """One node below a feature, with its parts: for pages that ask.

        Args:
            prompt: the text.
            feature: at the root.
            position: of it.
            path: which part to take at each level, by its place among them.

        Raises:
            InputError: there is no such node.
        """
        attribution = self.attribution(prompt)
        node = attribution.root(self.site, feature, position)
        for place in path:
            if not 0 <= place < len(node.children):
                raise InputError(f"path {list(path)}: there is no part {place}, the node has {len(node.children)}")
            node = node.children[place]
        return self._node(node, ())

    def _feature(
        self, attribution: RecursiveAttribution, feature: int, position: int, followed: tuple[int, ...]
    ) -> dict[str, Any]:
        node = attribution.root(self.site, feature, position)
        content = self._node(node, followed)
        if self.site.kind == "heads":
            content["control"] = self._control(attribution, node)
            heads = attribution.paths.n_heads(node.layer or 0)
            content["shares"] = _rounded(head_shares(self.dictionaries[self.site], heads)[feature])
        return content

    def _control(self, attribution: RecursiveAttribution, node: Node) -> dict[str, float]:
        """Where the value of random directions comes from at the same token, beside the feature's own."""
        assert node.table is not None
        assert node.layer is not None
        assert node.position is not None
        paths = attribution.paths
        work = AttentionAtWork(paths.patterns[node.layer][None], paths.attention(node.layer, "values")[None])
        random = localisation(random_attribution(work, 0, node.position, _DIRECTIONS).sum(dim=1))
        return {
            "own": float(localisation(node.table.sum(dim=0))),
            "random": float(random.mean()),
            "spread": float(random.std()),
        }

    def _node(self, node: Node, followed: tuple[int, ...] | None) -> dict[str, Any]:
        """A node as the page takes it.

        Args:
            node: which.
            followed: how many of its parts are followed, of each of those how many of theirs, and so on; None leaves
                its own parts out.
        """
        content: dict[str, Any] = {"kind": node.kind, "value": node.value}
        for name in ("layer", "position", "feature", "activation"):
            if (value := getattr(node, name)) is not None:
                content[name] = value
        if node.site is not None:
            content["site"] = str(node.site)
        if node.kind == "feature" and node.site is not None and node.feature is not None:
            content["says"] = self._says(node.site, node.feature)
        if not node.expandable:
            return content
        content["open"] = True
        if followed is None:
            return content
        if node.table is not None and node.kind in ("feature", "attention"):
            content["table"] = [_rounded(row) for row in node.table]
        content["parts"] = self._parts(node, followed)
        content["rounding"] = node.rounding
        return content

    def _parts(self, node: Node, followed: tuple[int, ...]) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        left: list[float] = []
        to_follow = followed[0] if followed else 0
        for place, child in enumerate(node.children):
            # Sources are shown along the text, and biases and errors whatever their size.
            if child.kind in ("feature", "attention", "mlp") and len(parts) >= _PARTS_SHOWN:
                left.append(child.value)
                continue
            deeper = child.expandable and to_follow > 0
            to_follow -= deeper
            parts.append({"place": place, **self._node(child, followed[1:] if deeper else None)})
        if left:
            parts.append({"kind": "remainder", "value": sum(left), "count": len(left)})
        return parts

    # --- words -----------------------------------------------------------------------------------------------------

    @cached_property
    def _decode(self) -> Callable[[Sequence[int]], list[str]]:
        return token_texts(self.lm.tokenizer)

    @cached_property
    def _unembedding(self) -> Float[Tensor, "vocabulary d_model"]:
        return self.lm.unembedding()[0].float() * self.lm.final_norm_gain()

    def _says(self, site: Site, feature: int) -> list[str]:
        """The tokens that a feature promotes the most, where its direction speaks of the stream."""
        if (site, feature) not in self._promoted:
            self._learn(site, [feature])
        return self._promoted[site, feature]

    def _learn(self, site: Site, features: Sequence[int]) -> None:
        """Find out what several features promote, at the price of one product with the vocabulary."""
        if not self.lm.is_causal or site.kind == "mlp_in":
            self._promoted.update({(site, feature): [] for feature in features})
            return
        if site not in self._directions:
            sae = self.dictionaries[site]
            in_stream = output_directions(sae, self.lm, site) if site.kind == "heads" else sae.decoder_weight.detach()
            self._directions[site] = in_stream.float()
        lens = logit_lens(self._directions[site][list(features)], self._unembedding, top=3)
        for feature, ids in zip(features, lens.promoted_ids, strict=True):
            self._promoted[site, feature] = [readable(each) for each in self._decode(ids.tolist())]


def write_explorer(path: Path | str, explorer: Explorer, prompts: Sequence[str] = DEFAULT_PROMPTS) -> Path:
    """Write the page with some prompts to ``path``, whole or not at all, and return the path.

    Args:
        path: beside a ``report.html`` its features link there.
        explorer: see there.
        prompts: at least one.

    Raises:
        InputError: no prompt, or one that is empty or too long; the folder cannot be written or the disk is full.
    """
    path = Path(path)
    if not prompts:
        raise InputError("prompts is empty: give at least one")
    explored = [explorer.explore(each) for each in dict.fromkeys(prompts)]
    text = render(explorer, explored, report=(path.parent / "report.html").exists())
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return path


def render(
    explorer: Explorer, explored: Sequence[Mapping[str, Any]], *, report: bool = False, live: bool = False
) -> str:
    """The page as text.

    Args:
        explorer: see there.
        explored: what its `Explorer.explore` gave.
        report: whether there is a report beside the page to link to.
        live: whether the page may ask the server that it comes from.
    """
    style, script = read_templates(["report.css", "explorer.css"]), read_templates(["page.js", "explorer.js"])
    about = {**explorer.about(), "report": report, "live": live, "longest": LONGEST_PROMPT}
    blocks = [("about", encode_block({}, about))]
    blocks += [(f"prompt-{number}", encode_block({}, content)) for number, content in enumerate(explored)]
    return template("explorer.html.j2").render(
        title=readable(explorer.title),
        policy=page_policy(script, style, may_ask=live),
        style=style,
        script=script,
        live=live,
        report=report,
        version=page_version(),
        blocks=blocks,
    )


def _rounded(values: Tensor) -> list[float]:
    """Six digits: a page needs no more, and shows sums that were made before rounding."""
    return [float(f"{value:.6g}") for value in np.asarray(values.detach().cpu(), dtype=float)]
