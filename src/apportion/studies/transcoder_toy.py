"""The known circuit of the study `transcoder_circuits`: a small model whose answers two tokens of a prompt decide.

A prompt holds a token of class A, one of class B, distractors, and at its end a query; the answer is
``(a + b) mod numbers``. Attention must find the two tokens, an MLP must combine them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from apportion.allocate import TokenChoice
from apportion.features import Recipe, Transcoder, fit_transcoder
from apportion.features.circuit_graph import Node
from apportion.features.transcoder_circuits import greedy_circuit
from apportion.models import Site, capture
from apportion.models.splice import splice


@dataclass(frozen=True)
class Toy:
    """Sizes of the task, the model and its transcoders.

    Args:
        numbers: of each class.
        length: tokens a prompt.
        width: of the model.
        steps: of its training.
        n_features: of each transcoder.
        budget: features a token.
        transcoder_steps: of their training.
        prompts: to take apart.
    """

    numbers: int = 7
    length: int = 10
    width: int = 64
    steps: int = 500
    n_features: int = 256
    budget: int = 8
    transcoder_steps: int = 200
    prompts: int = 200

    @property
    def vocabulary(self) -> int:
        """A, B, 16 distractors, the query, the answers."""
        return 3 * self.numbers + 17


def draw(size: Toy, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts, answers, and the positions of the two tokens that decide."""
    generator = torch.Generator().manual_seed(seed)
    ids = 2 * size.numbers + torch.randint(16, (count, size.length), generator=generator)
    pair = torch.randint(size.numbers, (count, 2), generator=generator)
    # Never at the first place, where attention rests.
    places = 1 + torch.rand(count, size.length - 2, generator=generator).argsort(dim=1)[:, :2]
    ids.scatter_(1, places, pair + torch.tensor([0, size.numbers]))
    ids[:, -1] = 2 * size.numbers + 16
    return ids, 2 * size.numbers + 17 + pair.sum(dim=1) % size.numbers, places


def build(size: Toy, seed: int) -> Any:
    """A trained model."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=size.length,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(size.steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20, 2 * (1 - step / size.steps))
        ids, answers, _ = draw(size, 256, 10_000 * seed + step)
        loss = cross_entropy(model(input_ids=ids, use_cache=False).logits[:, -1], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def transcoders_of(model: Any, size: Toy, seed: int) -> dict[int, Transcoder]:
    """A transcoder of each MLP, trained on all tokens of prompts."""
    found = {}
    for layer in range(2):
        sites = [Site(layer, "mlp_in"), Site(layer, "mlp_out")]

        def batches(step: int, sites: list[Site] = sites) -> tuple[Tensor, Tensor]:
            ids, _, _ = draw(size, 64, 2**30 + 10_000 * seed + step)
            seen = capture(model, sites, ids)
            # The query's token, where the answer is made, as often as all others together.
            x, y = (torch.cat([seen[site].flatten(0, 1), seen[site][:, -1].repeat(4, 1)]) for site in sites)
            return x, y

        recipe = Recipe(
            TokenChoice(size.budget),
            size.n_features,
            size.transcoder_steps,
            64 * (size.length + 4),
            learning_rate=4e-3,
            auxiliary="dead",
            seed=seed,
        )
        found[layer], _ = fit_transcoder(recipe, batches, size.width, size.width, progress=False)
    return found


def measure_toy(size: Toy, seed: int) -> dict[str, float]:
    """Train, take prompts apart, and take features away."""
    model = build(size, seed)
    ids, answers, places = draw(size, size.prompts, 2**29 + seed)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, -1]
    found = transcoders_of(model, size, seed)
    decides, lost = [], {"top": [], "other": []}  # type: ignore[var-annotated]
    sizes = {"top": [], "other": []}  # type: ignore[var-annotated]
    generator = torch.Generator().manual_seed(seed)
    for row in range(size.prompts):
        root = Node("logit", size.length - 1, None, int(answers[row]))
        circuit = greedy_circuit(model, ids[row], found, root, iterations=3, branches=15, first_is_whole=False)
        read: dict[int, float] = {}
        for (child, _), value in circuit.edges.items():
            if child.kind == "head" and child.reads_at != size.length - 1:
                read[child.reads_at] = read.get(child.reads_at, 0.0) + abs(value)
        strongest = max(read, key=lambda place: read[place]) if read else -1
        decides.append(strongest in places[row].tolist())
        features = [node for node in circuit.nodes if node.kind == "feature"]
        top = sorted(features, key=lambda node: -abs(circuit.nodes[node].value))[:5]
        other = _alike(model, ids[row], found, top, generator)
        pairs = [(a, b) for a, b in zip(top, other, strict=True) if b is not None]
        before = float(logits[row].log_softmax(-1)[answers[row]])
        # As much is taken away along the others as along the top ones, however strongly the others fire.
        amounts = [_value(model, ids[row], found, a) for a, _ in pairs]
        for name, chosen in (("top", [a for a, _ in pairs]), ("other", [b for _, b in pairs])):
            after = without(model, ids[row], found, chosen, amounts).log_softmax(-1)[answers[row]]
            lost[name].append(before - float(after))
            sizes[name] += [_value(model, ids[row], found, node) for node in chosen]

    def mean(values: list[float]) -> float:
        return sum(values) / max(len(values), 1)

    return {
        "accuracy": float((logits.argmax(-1) == answers).float().mean()),
        "strongest source decides": mean([float(each) for each in decides]),
        "log probability lost, top features": mean(lost["top"]),
        "log probability lost, other features": mean(lost["other"]),
        "activation of top features": mean(sizes["top"]),
        "activation of other features": mean(sizes["other"]),
    }


def _codes(model: Any, ids: Tensor, found: dict[int, Transcoder], layer: int) -> Tensor:
    site = Site(layer, "mlp_in")
    with torch.no_grad():
        return found[layer].encode(capture(model, [site], ids[None])[site][0]).to_dense()


def _value(model: Any, ids: Tensor, found: dict[int, Transcoder], node: Node) -> float:
    layer, feature = node.place
    return float(_codes(model, ids, found, layer)[node.token, feature])


def _alike(
    model: Any, ids: Tensor, found: dict[int, Transcoder], top: list[Node], generator: torch.Generator
) -> list[Node | None]:
    """For each node another feature of its layer and token, one of the three that fire most nearly as strongly."""
    taken = set(top)
    others: list[Node | None] = []
    for node in top:
        layer, feature = node.place
        codes = _codes(model, ids, found, layer)[node.token]
        free = [
            place
            for place in codes.nonzero().flatten().tolist()
            if Node("feature", node.token, layer, place) not in taken
        ]
        if not free:
            others.append(None)
            continue
        free.sort(key=lambda place: abs(float((codes[place] / codes[feature]).log())))
        chosen = free[int(torch.randint(min(3, len(free)), (), generator=generator))]
        others.append(Node("feature", node.token, layer, chosen))
        taken.add(others[-1])  # type: ignore[arg-type]
    return others


@torch.no_grad()
def without(model: Any, ids: Tensor, found: dict[int, Transcoder], nodes: list[Node], amounts: list[float]) -> Tensor:
    """Logits of the last token with an amount of some features taken out of the MLPs' outputs, errors kept."""
    import contextlib

    def taken_out(layer: int) -> Any:
        own = [(node, amount) for node, amount in zip(nodes, amounts, strict=True) if node.layer == layer]

        def replace(y: Tensor) -> Tensor:
            y = y.clone()
            for node, amount in own:
                y[0, node.token] -= amount * found[layer].decoder_weight[node.place[1]]
            return y

        return splice(model, Site(layer, "mlp_out"), replace)

    with contextlib.ExitStack() as stack:
        for layer in found:
            stack.enter_context(taken_out(layer))
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, -1]
    return logits
