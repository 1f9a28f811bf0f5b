"""One prompt in a model as a sum: what each part wrote to the residual stream, and what a reading owes to each part.

With attention patterns and norm scales held fixed, whatever is read from the stream (an attention layer's values,
queries or keys, the input of an MLP, the stream itself) is a linear function of what the embeddings, the heads of each
layer and the MLPs have written, plus a constant of the model's biases. `DirectPaths` runs the model once with every
such part as a leaf of the graph, so that one backward pass gives the share of every part *along the direct path*: what
a part did by way of a later head or MLP belongs to that one, which can be taken apart in its turn.

Norms are computed as the linear maps they are held to be, in the dtype of the model, so that sums are exact to its
rounding (transformers computes some norms in float32 whatever the model's dtype). The constants are not what is left
over: they are read from a second pass in which every leaf is zero.

Sources: the frozen decomposition is that of Elhage et al. 2021; recursive attribution is section 4 of Kissane et al.
2024 (arXiv 2406.17759).
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.models.families import base_of, blocks_of, transformer_of
from apportion.models.hooks import visit
from apportion.models.linear import AttentionAtWork, BareNorm, LinearNorm, norms_of, watched
from apportion.models.site import Site
from apportion.models.splice import splice

Part = Literal["values", "queries", "keys"]
# Places whose activations are linear in what was written before them.
READABLE = ("embeddings", "residual", "attn_out", "mlp_in")


@dataclass(frozen=True, eq=False)
class Pullback:
    """A number that was read, as a linear function of everything written: gradients, and what is written at zero.

    Attributes:
        embeddings: gradient with respect to the embeddings.
        heads: by layer, with respect to its heads' outputs side by side; only layers that reach the reading directly.
        mlps: by layer, with respect to its MLP's output.
        constant: what the model's own biases contribute.
    """

    embeddings: Float[Tensor, "time d_model"]
    heads: dict[int, Float[Tensor, "time width"]]
    mlps: dict[int, Float[Tensor, "time d_model"]]
    constant: float


class DirectPaths:
    """A forward pass over one prompt, kept with its graph.

    Args:
        model: a `LanguageModel` or a transformers model; it is left as it was.
        input_ids: the prompt's token ids.

    Attributes:
        input_ids: the same.
        embeddings: what the embeddings wrote, ``[time, d_model]``.
        heads: by layer, the heads' outputs side by side, ``[time, heads * head_width]``.
        mlps: by layer, what the MLP gave, ``[time, d_model]``.
        patterns: by layer, ``[heads, destination, source]``.

    Raises:
        InputError: fewer than one token; the model computes attention in a way of its own that cannot be watched.
    """

    def __init__(self, model: Any, input_ids: Int[Tensor, " time"]) -> None:
        if len(input_ids) < 1:
            raise InputError("the prompt has no tokens: write something")
        self.input_ids = input_ids
        self._model = transformer_of(model)
        self.n_layers = len(blocks_of(self._model))
        self._scales: dict[nn.Module, Tensor] = {}
        self._leaves: dict[Site, Tensor] = {}
        self._attention, self._read = self._pass(zero=False)
        self._zero_attention, self._zero_read = self._pass(zero=True)
        layers = range(self.n_layers)
        self.embeddings = self._leaves[Site(None, "embeddings")].detach()[0]
        self.heads = [self._leaves[Site(layer, "heads")].detach()[0] for layer in layers]
        self.mlps = [self._leaves[Site(layer, "mlp_out")].detach()[0] for layer in layers]
        self.patterns = [self._attention[layer].pattern[0] for layer in layers]

    @property
    def n_tokens(self) -> int:
        """Of the prompt."""
        return len(self.input_ids)

    def n_heads(self, layer: int) -> int:
        """Query heads of a layer."""
        return self.patterns[layer].shape[0]

    def attention(self, layer: int, part: Part) -> Float[Tensor, "heads time width"]:
        """What an attention layer computed from the stream: values, queries or keys, one for each query head."""
        found: Tensor = getattr(self._attention[layer], part)
        return found.detach()[0]

    def scaling(self, layer: int) -> float:
        """What the products of queries and keys are multiplied with."""
        return self._attention[layer].scaling

    def stream(self, layer: int) -> Float[Tensor, "time d_model"]:
        """The residual stream before block ``layer``."""
        return self.activations(stream_before(layer))

    def activations(self, site: Site) -> Float[Tensor, "time width"]:
        """What the model computed at a site.

        Raises:
            InputError: a site that this class does not keep.
        """
        if site in self._leaves:
            return self._leaves[site].detach()[0]
        return self._reading(site).detach()[0]

    def through(self, site: Site, cotangent: Float[Tensor, "time width"]) -> Pullback:
        """Pull ``(activations(site) * cotangent).sum()`` back to everything written before.

        Raises:
            InputError: the site is not a linear function of the stream.
        """
        return self._pullback(self._reading(site), self._reading(site, zero=True), cotangent)

    def through_attention(self, layer: int, part: Part, cotangent: Float[Tensor, "heads time width"]) -> Pullback:
        """Pull ``(attention(layer, part) * cotangent).sum()`` back to everything written below the layer."""
        output, at_zero = getattr(self._attention[layer], part), getattr(self._zero_attention[layer], part)
        return self._pullback(output, at_zero, cotangent)

    def to_stream(
        self, layer: int, part: Part, cotangent: Float[Tensor, "heads time width"]
    ) -> tuple[Float[Tensor, "time d_model"], float]:
        """The gradient of ``(attention(layer, part) * cotangent).sum()`` with respect to the stream before the layer.

        Returns:
            The gradient, and the constant: what the biases between the stream and there contribute.
        """
        output = getattr(self._attention[layer], part)
        stream = self._read[stream_before(layer)]
        (gradient,) = torch.autograd.grad(output, stream, cotangent[None], retain_graph=True)
        # With nothing written only biases are left: those of the map between, and, through it, those in the stream.
        at_zero = (getattr(self._zero_attention[layer], part).detach()[0].double() * cotangent).sum()
        from_stream = (self._zero_read[stream_before(layer)].detach().double() * gradient).sum()
        constant = float(at_zero - from_stream)
        return gradient[0], constant

    def _reading(self, site: Site, zero: bool = False) -> Tensor:
        read = self._zero_read if zero else self._read
        if site not in read:
            raise InputError(
                f"site {site}: what is there is not a linear function of the residual stream; "
                f"these are: {', '.join(READABLE)}, and heads by way of their values"
            )
        return read[site]

    def _pullback(self, output: Tensor, at_zero: Tensor, cotangent: Tensor) -> Pullback:
        leaves = list(self._leaves.values())
        found = torch.autograd.grad(output, leaves, cotangent[None], retain_graph=True, allow_unused=True)
        gradients = {site: each[0] for site, each in zip(self._leaves, found, strict=True) if each is not None}
        embeddings = gradients.pop(Site(None, "embeddings"), None)
        return Pullback(
            torch.zeros_like(self.embeddings) if embeddings is None else embeddings,
            {site.layer: each for site, each in gradients.items() if site.kind == "heads" and site.layer is not None},
            {site.layer: each for site, each in gradients.items() if site.kind == "mlp_out" and site.layer is not None},
            float((at_zero.detach()[0].double() * cotangent).sum()),
        )

    def _pass(self, zero: bool) -> tuple[dict[int, AttentionAtWork], dict[Site, Tensor]]:
        """Run the model with every part as a leaf; at zero, with the norm scales of the pass before."""
        read: dict[Site, Tensor] = {}

        def leaf(site: Site) -> Callable[[Tensor], Tensor]:
            def put(x: Tensor) -> Tensor:
                if zero:
                    return torch.zeros_like(x)
                self._leaves[site] = x.detach().requires_grad_()
                return self._leaves[site]

            return put

        def keep(site: Site) -> Callable[[Tensor], None]:
            def see(x: Tensor) -> None:
                read[site] = x

            return see

        embeddings = Site(None, "embeddings")
        written = [embeddings] + [Site(layer, kind) for layer in range(self.n_layers) for kind in ("heads", "mlp_out")]
        wanted = [Site(layer, kind) for layer in range(self.n_layers) for kind in READABLE[1:]]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(not zero))
            seen = stack.enter_context(watched(self._model, freeze=True, graph=True))
            for norm in norms_of(self._model):
                stack.callback(norm.register_forward_hook(self._linear(norm, zero)).remove)
            for site in written:
                stack.enter_context(splice(self._model, site, leaf(site)))
            # After the leaves are in place, so that what is kept is what the next part sees.
            for site in [embeddings, *wanted]:
                stack.enter_context(visit(self._model, site, keep(site)))
            base_of(self._model)(input_ids=self.input_ids[None], use_cache=False)
        return dict(seen), read

    def _linear(self, norm: nn.Module, zero: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """A hook that makes a norm the linear map it is at the scale it has in the first pass."""

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            (x, *_rest) = args
            linear = LinearNorm(BareNorm(norm), x.shape[-1])
            if not zero:
                self._scales[norm] = linear.scale(x.detach(), output.detach())
            return linear.directions(x) * self._scales[norm] + linear.bias

        return hook


def stream_before(layer: int) -> Site:
    """The site whose activations are the residual stream that block ``layer`` takes in."""
    return Site(layer - 1, "residual") if layer else Site(None, "embeddings")
