"""One forward pass taken apart: everything that a reading of the residual stream is a sum of, exactly.

With attention patterns and norm scales held as they are (`apportion.models.linear`), whatever reads the residual stream
linearly (a transcoder feature before its ReLU, a logit, a head's value of a source token) is a sum over what was
written below: embeddings, heads, MLPs. An MLP that has a transcoder is in turn the sum of the features that fire, a
bias, a skip path where there is one, and what the transcoder gets wrong (the error). Section 3 of Dunefsky et al. 2024
(arXiv 2406.11944); the differences from the authors' code are said in `transcoder_circuits`.

A share is found as a gradient times what was written. The gradients are those of the model itself, run with every
writer cut off (a leaf), so nothing here knows how a family of models is built.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.errors import InputError
from apportion.features.transcoder import Transcoder
from apportion.models import Site
from apportion.models.families import base_of, blocks_of, transformer_of
from apportion.models.hooks import visit
from apportion.models.linear import linearised, norm_inputs
from apportion.models.splice import splice

LayerNorms = Literal["exact", "scalar"]


@dataclass(frozen=True, eq=False)
class Reading:
    """A linear reading of the residual stream, and how it weighs what was written at each token below it.

    Attributes:
        value: of the reading, biases of norms and projections on its way included.
        embedding: its gradient with respect to the stream before block 0.
        attention, mlps: likewise for what each layer's attention and MLP write; zero from the reader's own layer on.
        constant: what of ``value`` none of these explain (those biases).
    """

    value: float
    embedding: Float[Tensor, "time d"]
    attention: Float[Tensor, "layers time d"]
    mlps: Float[Tensor, "layers time d"]
    constant: float

    def scaled(self, factor: float) -> "Reading":
        """``factor`` times the reading."""
        return Reading(
            factor * self.value,
            factor * self.embedding,
            factor * self.attention,
            factor * self.mlps,
            factor * self.constant,
        )


@dataclass(frozen=True, eq=False)
class Firing:
    """The features of one transcoder that fire on a prompt, sorted by token.

    Attributes:
        tokens, features: where and which.
        values: how strongly; a feature writes ``values * decoder_weight[feature]``.
    """

    tokens: Int[Tensor, " n"]
    features: Int[Tensor, " n"]
    values: Float[Tensor, " n"]


class FrozenPass:
    """A prompt's forward pass, from which readings can be taken.

    Args:
        model: a causal `LanguageModel` or transformers model.
        input_ids: the prompt.
        transcoders: by the layer whose MLP each imitates; of layers without one the MLP's whole output is one part.
        attention: ``nodes`` cuts the stream at every attention output, so that a reading sees what each attention layer
            wrote; ``through`` lets readings pass through attention to the tokens that it read from.
        ln: how a norm is passed: ``exact``, the linear map that it is at its scale; ``scalar``, the authors' code, one
            factor a direction and token that keeps the total, but not the shares.
        first_is_whole: take the MLP outputs of the first token as one part each. Transcoders are not trained there,
            where models park attention and activations are 10 to 100 times the median.

    Raises:
        InputError: an empty prompt, a layer that the model lacks, a transcoder of other widths or not folded, a model
            whose attention cannot be watched, or (``scalar``) one that does not norm before its layers read.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Int[Tensor, " time"],
        transcoders: Mapping[int, Transcoder],
        *,
        attention: Literal["nodes", "through"] = "nodes",
        ln: LayerNorms = "exact",
        first_is_whole: bool = True,
    ) -> None:
        self.model = transformer_of(model)
        self.input_ids, self.ln, self.attention = input_ids, ln, attention
        self.transcoders = dict(sorted(transcoders.items()))
        self.n_layers, self.n_tokens = len(blocks_of(self.model)), len(input_ids)
        if ln not in ("exact", "scalar"):
            raise InputError(f"ln={ln!r}: one of exact, scalar")
        if not self.n_tokens:
            raise InputError("the prompt has no tokens: give at least one")
        self._check()
        self._run()
        with torch.no_grad():
            self.firing = {layer: self._firing(layer, first_is_whole) for layer in self.transcoders}
            self._split_mlps(first_is_whole)

    # --- the pass ---------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        for layer, transcoder in self.transcoders.items():
            if not 0 <= layer < self.n_layers:
                raise InputError(f"layer {layer}: the model has {self.n_layers} layers, 0 to {self.n_layers - 1}")
            width = Site(layer, "mlp_in").width(self.model)
            if (transcoder.d_in, transcoder.d_out) != (width, width):
                raise InputError(
                    f"the transcoder of layer {layer} maps {transcoder.d_in} to {transcoder.d_out} dimensions, the "
                    f"model's MLPs {width} to {width}: give one that was trained on this model"
                )
            if float(transcoder.input_scale) != 1 or float(transcoder.output_scale) != 1:
                raise InputError(
                    f"the transcoder of layer {layer} is not in the model's units: call fold_scale() first"
                )

    def _run(self) -> None:
        layers = range(self.n_layers)
        self.embedding_written: Tensor = torch.empty(0)
        self.mlp_in: dict[int, Tensor] = {}
        self.heads: dict[int, Tensor] = {}
        written: dict[Site, Tensor] = {}

        def cut(site: Site) -> Callable[[Tensor], Tensor]:
            def replace(x: Tensor) -> Tensor:
                written[site] = x.detach().requires_grad_()
                return written[site]

            return replace

        def keep(into: dict[int, Tensor], layer: int) -> Callable[[Tensor], None]:
            def visitor(x: Tensor) -> None:
                into[layer] = x

            return visitor

        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            seen = stack.enter_context(linearised(self.model, mlps="model"))
            norms = stack.enter_context(norm_inputs(self.model))
            stack.enter_context(splice(self.model, Site(None, "embeddings"), cut(Site(None, "embeddings"))))
            for layer in layers:
                stack.enter_context(visit(self.model, Site(layer, "heads"), keep(self.heads, layer)))
                stack.enter_context(visit(self.model, Site(layer, "mlp_in"), keep(self.mlp_in, layer)))
                stack.enter_context(splice(self.model, Site(layer, "mlp_out"), cut(Site(layer, "mlp_out"))))
                if self.attention == "nodes":
                    stack.enter_context(splice(self.model, Site(layer, "attn_out"), cut(Site(layer, "attn_out"))))
            self.final = base_of(self.model)(input_ids=self.input_ids[None], use_cache=False).last_hidden_state
        self._norms = norms
        self._leaves = [written[Site(None, "embeddings")]]
        if self.attention == "nodes":
            self._leaves += [written[Site(layer, "attn_out")] for layer in layers]
        self._leaves += [written[Site(layer, "mlp_out")] for layer in layers]
        self.embedding_written = self._leaves[0].detach()[0]
        self.attention_written = [leaf.detach()[0] for leaf in self._leaves[1 : -self.n_layers]]
        self.mlp_written = [leaf.detach()[0] for leaf in self._leaves[-self.n_layers :]]
        self.pattern = [seen[layer].pattern[0] for layer in layers]
        self.values = [seen[layer].values[0] for layer in layers]
        self.n_heads = self.pattern[0].shape[0]

    def _firing(self, layer: int, first_is_whole: bool) -> Firing:
        """Who fires is the transcoder's word; how strongly is computed in the model's precision."""
        transcoder, x = self.transcoders[layer], self.mlp_in[layer].detach()[0]
        codes = transcoder.eval().encode(x.to(transcoder.encoder_weight.dtype).float())
        tokens, features = codes.row_indices(), codes.col_indices
        if first_is_whole:
            tokens, features = tokens[tokens > 0], features[tokens > 0]
        weight = transcoder.encoder_weight[features].to(x.dtype)
        values = ((x - transcoder.centre)[tokens] * weight).sum(dim=1) + transcoder.encoder_bias[features]
        return Firing(tokens, features, values.to(x.dtype))

    def _split_mlps(self, first_is_whole: bool) -> None:
        """What each transcoder's bias, skip path and error write; where there is no transcoder, the MLP as a whole."""
        self.whole: dict[int, Tensor] = {}
        self.errors: dict[int, Tensor] = {}
        self.skips: dict[int, Tensor] = {}
        first = 1 if first_is_whole else 0
        for layer, written in enumerate(self.mlp_written):
            if layer not in self.transcoders:
                self.whole[layer] = written
                continue
            transcoder, firing = self.transcoders[layer], self.firing[layer]
            rows = firing.values[:, None] * transcoder.decoder_weight[firing.features].to(written.dtype)
            explained = torch.zeros_like(written).index_add_(0, firing.tokens, rows)
            explained[first:] += transcoder.decoder_bias.to(written.dtype)
            if transcoder.skip_weight is not None:
                skip = (self.mlp_in[layer].detach()[0] - transcoder.centre) @ transcoder.skip_weight.T.to(written.dtype)
                skip[:first] = 0
                self.skips[layer] = skip
                explained += skip
            self.errors[layer] = written - explained
            self.errors[layer][:first] = 0
            self.whole[layer] = torch.zeros_like(written)
            self.whole[layer][:first] = written[:first]

    # --- readings ---------------------------------------------------------------------------------------------------

    def of_feature(self, layer: int, feature: int, token: int) -> Reading:
        """``encoder_weight[feature] . mlp_in``: a feature's value but for ``feature_bias``."""
        weight = self.transcoders[layer].encoder_weight[feature].detach()
        return self.of_mlp_input(layer, weight, token)

    def of_mlp_input(self, layer: int, direction: Float[Tensor, " d"], token: int) -> Reading:
        """``direction . mlp_in`` at a token."""
        return self._read(self.mlp_in[layer], token, direction)

    def of_final(self, direction: Float[Tensor, " d"], token: int) -> Reading:
        """``direction . (the stream after the last norm)`` at a token: a logit, for a row of the head."""
        return self._read(self.final, token, direction)

    def of_head(self, layer: int, head: int, direction: Float[Tensor, " width"], token: int) -> Reading:
        """``direction . (output of a head)`` at a token; its weights are over all the tokens that the head read from.

        Each source token has its own share, see ``heads_of``; row ``s`` of the reading's gradients is that of source s.
        """
        width = direction.shape[0]
        whole = direction.new_zeros(self.heads[layer].shape[-1])
        whole[head * width : (head + 1) * width] = direction
        return self._read(self.heads[layer], token, whole)

    def feature_bias(self, layer: int, feature: int) -> float:
        """What a feature's value is beyond its reading: ``encoder_bias - encoder_weight . centre``."""
        transcoder, dtype = self.transcoders[layer], self.final.dtype
        weight, centre = (each.detach().to(dtype) for each in (transcoder.encoder_weight[feature], transcoder.centre))
        return float(transcoder.encoder_bias[feature].detach().to(dtype) - weight @ centre)

    def value_of(self, layer: int, feature: int, token: int) -> float:
        """What a feature fires with at a token.

        Raises:
            InputError: it does not fire there (or the token's MLP is taken as one part); says its score.
        """
        firing = self.firing[layer]
        found = ((firing.tokens == token) & (firing.features == feature)).nonzero().flatten()
        if found.numel():
            return float(firing.values[found[0]])
        x = self.mlp_in[layer].detach()[0, token]
        score = float(self.transcoders[layer].encoder_weight[feature].to(x.dtype) @ x) + self.feature_bias(
            layer, feature
        )
        raise InputError(
            f"feature {feature} of layer {layer} does not fire at token {token} (its score there is {score:.4g}): "
            "attributions explain features that fire; choose another feature or token"
        )

    def heads_of(
        self, layer: int, direction: Float[Tensor, " d"], token: int
    ) -> tuple[Float[Tensor, "heads time"], Float[Tensor, "heads width"]]:
        """How much each head writes along a direction, by the source token that it took it from.

        Returns:
            The shares; and the direction as each head's output is read by it. The shares sum to ``direction`` times the
            attention's output but for the bias of its output projection.
        """
        module, _ = Site(layer, "attn_out").resolve(self.model)
        with torch.enable_grad():
            at = torch.zeros_like(self.heads[layer][0, :1]).requires_grad_()
            (pulled,) = torch.autograd.grad(module(at), at, direction[None].to(at.dtype))
        by_head = pulled[0].view(self.n_heads, -1)
        read = torch.einsum("hsw,hw->hs", self.values[layer], by_head)
        return self.pattern[layer][:, token] * read, by_head

    def _read(self, tensor: Tensor, token: int, direction: Tensor) -> Reading:
        weights = torch.zeros_like(tensor)
        weights[0, token] = direction.to(tensor.dtype)
        value = float((tensor.detach() * weights).sum())
        grads = self._gradients(tensor, weights)
        explained = sum(float((grad * leaf.detach()[0]).sum()) for grad, leaf in zip(grads, self._leaves, strict=True))
        cut = self.attention == "nodes"
        mlps = torch.stack(grads[-self.n_layers :])
        attention = torch.stack(grads[1 : -self.n_layers]) if cut else torch.zeros_like(mlps)
        return Reading(value, grads[0], attention, mlps, value - explained)

    def _gradients(self, tensor: Tensor, weights: Tensor) -> list[Tensor]:
        if self.ln == "exact":
            return self._pull(tensor, weights)
        before, after = self._norms.around(tensor)
        # From what is read back to what the norm gave, then over the norm by one factor a token.
        direction = weights
        if tensor is not after:
            (direction,) = torch.autograd.grad(tensor, after, weights, retain_graph=True)
        total, at = (
            (direction * after.detach()).sum(-1, keepdim=True),
            (direction * before.detach()).sum(-1, keepdim=True),
        )
        factor = torch.where(at == 0, torch.zeros_like(at), total / torch.where(at == 0, torch.ones_like(at), at))
        return self._pull(before, direction * factor)

    def _pull(self, tensor: Tensor, weights: Tensor) -> list[Tensor]:
        if not tensor.requires_grad:
            return [torch.zeros_like(leaf[0]) for leaf in self._leaves]
        found = torch.autograd.grad(tensor, self._leaves, weights, retain_graph=True, allow_unused=True)
        return [
            torch.zeros_like(leaf[0]) if grad is None else grad[0]
            for grad, leaf in zip(found, self._leaves, strict=True)
        ]

    def layers_with_gradient(self, gradients: Float[Tensor, "layers time d"], token: int) -> Iterator[int]:
        """The layers whose writing at a token a reading sees at all."""
        yield from gradients[:, token].abs().amax(dim=-1).nonzero().flatten().tolist()
