"""RAVEL: can one attribute of an entity be changed through the dictionary, and the others left alone?

Huang et al. 2024, *RAVEL: Evaluating Interpretability Methods on Disentangling Language Model Representations* (arXiv
2402.17700), as in SAEBench (``sae_bench.evals.ravel``). A prompt asks for an attribute of an entity ("... Kyoto is in
the country of"). For each attribute a binary mask over features is learned: on the last token of the base's entity,
masked features get the source entity's values, the others keep the base's, and the decoded code, *without the error*,
takes the activation's place.

| symbol | here |
|---|---|
| m = sigmoid(theta / T), T from 1 to 1e-4 on a log scale; theta starts at 0 | ``learned_mask``; then theta > 0 |
| loss | cross-entropy to the answer that is wanted, Adam, learning rate 1e-3, 2 epochs |
| ``cause_score`` | both prompts ask the attribute: share of greedy answers (6 tokens at most) that are the source's |
| ``isolation_score`` | both ask another attribute: share of answers that are still the base's |
| ``disentanglement_score`` | their mean |

all on held-out pairs and averaged over attributes. The control ``activations`` learns a mask over the activation's
dimensions, ``random dictionary`` over random features. ``mean_num_masked`` (ours) is how many units the mask takes:
masks are not bounded in size.

Entities here are cities with country, continent and language (`apportion.data.facts`), each prompt with one example
before it, and only pairs of city and attribute that the plain model answers count. SAEBench uses RAVEL's own entities
(500, up to 5,000 pairs an attribute) from a hub: levels are not comparable with its leaderboard; the exchange, the
temperatures and the comparison of answers are (``tests/features/suite/test_peers.py``). Batches are smaller here, so
that few pairs make some steps.

No result where fewer than two attributes have eight known cities, or where exchanging the *whole* activation changes
fewer than one answer in ten: then the site does not decide the answer, and what a dictionary does there says nothing
about it (``whole_activation`` in the details). Standard errors are over attributes.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.data.facts import CITY_PROMPTS, cities
from apportion.features.evaluate import Metric
from apportion.features.suite.result import NotApplicable, SuiteResult, mean_metric
from apportion.features.suite.units import Subject, Units
from apportion.models import LanguageModel, Site, capture, splice
from apportion.models.families import base_of, finish_logits

_LEAST_ENTITIES, _LEAST_CAUSE = 8, 0.1
_ANSWER_TOKENS = 6
_COLDEST = 1e-4
_PROMPTS_AT_ONCE = 32


@dataclass(frozen=True)
class Prompt:
    """A question about an entity that the model can answer.

    Attributes:
        attribute: what is asked.
        entity: about whom.
        ids: tokens of the prompt.
        position: the entity's last token.
        answer: the answer's first word.
        target: first token of the answer.
        length: tokens of the answer.
    """

    attribute: str
    entity: str
    ids: tuple[int, ...]
    position: int
    answer: str
    target: int
    length: int


@dataclass(frozen=True)
class Pair:
    """Indices of a base and a source prompt, and whether the answer should become the source's."""

    base: int
    source: int
    cause: bool


def evaluate_ravel(subject: Subject, *, pairs: int = 64, batch: int = 16, seed: int = 0) -> SuiteResult:
    """Disentanglement of the attributes of cities.

    Args:
        subject: the dictionary and its model.
        pairs: pairs an attribute that ask for it, and as many that ask for others; 70 % train the mask.
        batch: pairs a step.
        seed: of pairs and of their order.

    Raises:
        NotApplicable: see the module.
    """
    subject.check_causal()
    lm, site = subject.lm, subject.site
    prompts = known_prompts(lm)
    attributes = [name for name in CITY_PROMPTS if _entities(prompts, name) >= _LEAST_ENTITIES]
    asked = {name: _entities(prompts, name) for name in CITY_PROMPTS}
    if len(attributes) < 2:
        raise NotApplicable(
            f"{lm.name} knows too little about cities: of {len(cities())} it answers "
            + ", ".join(f"{name.lower()}: {known}" for name, known in asked.items())
            + f"; two attributes with {_LEAST_ENTITIES} are needed"
        )
    prompts = [prompt for prompt in prompts if prompt.attribute in attributes]
    entity = entity_activations(lm, site, prompts)
    every = {name: paired(prompts, name, pairs, seed) for name in attributes}
    whole = {
        name: _judge(lm, site, prompts, held_out, entity[[pair.source for pair in held_out]])[0]
        for name, (_, held_out) in every.items()
    }
    if np.mean(list(whole.values())) < _LEAST_CAUSE:
        share = np.mean(list(whole.values()))
        raise NotApplicable(
            f"exchanging the whole activation at {site} on a city's last token changes {share:.0%} of the answers: the "
            "site does not decide them; try an earlier layer"
        )
    scores: dict[str, dict[str, tuple[float, float, int]]] = {}
    for unit, units in subject.units().items():
        codes = units.encode(entity)
        scores[unit] = {}
        for name, (train, held_out) in every.items():
            mask = learned_mask(lm, site, prompts, train, codes, units, batch=batch, seed=seed)
            changed = interchanged(codes, held_out, (mask > 0).float(), units)
            cause, isolation = _judge(lm, site, prompts, held_out, changed)
            scores[unit][name] = (cause, isolation, int((mask > 0).sum()))
    figures = {unit: _figures(found) for unit, found in scores.items()}
    return SuiteResult(
        "ravel",
        figures[""],
        {unit: found for unit, found in figures.items() if unit},
        details={
            "attributes": {
                unit or "dictionary": {
                    name: {"cause_score": cause, "isolation_score": isolation, "num_masked": masked}
                    for name, (cause, isolation, masked) in found.items()
                }
                for unit, found in scores.items()
            },
            "known": asked,
            "whole_activation": whole,
            "pairs": {name: [len(train), len(held_out)] for name, (train, held_out) in every.items()},
        },
        settings={"pairs": pairs, "batch": batch, "seed": seed},
    )


def disentanglement(cause: float, isolation: float) -> float:
    """The mean of both."""
    return (cause + isolation) / 2


def _figures(scores: dict[str, tuple[float, float, int]]) -> dict[str, Metric]:
    found = list(scores.values())
    return {
        metric.name: metric
        for metric in (
            mean_metric(
                "disentanglement_score",
                [disentanglement(cause, isolation) for cause, isolation, _ in found],
                "mean of cause_score and isolation_score",
            ),
            mean_metric("cause_score", [each[0] for each in found], "answers that became the source's, as they should"),
            mean_metric(
                "isolation_score", [each[1] for each in found], "answers that stayed the base's, as they should"
            ),
            mean_metric("mean_num_masked", [each[2] for each in found], "units that the mask exchanges"),
        )
    }


# --- prompts and pairs -----------------------------------------------------------------------------------------------


@torch.no_grad()
def known_prompts(lm: LanguageModel) -> list[Prompt]:
    """The prompts about cities whose answer the model gives by itself."""
    asked = []
    for city, facts in cities():
        for attribute, (template, _) in CITY_PROMPTS.items():
            ids, position = _tokens(lm, template, city)
            answer = lm.tokenizer(" " + facts[attribute], add_special_tokens=False)["input_ids"]
            length = min(len(answer), _ANSWER_TOKENS)
            asked.append(Prompt(attribute, city, ids, position, facts[attribute], answer[0], length))
    right = [False] * len(asked)
    for rows in _alike(asked):
        asking = torch.tensor([asked[row].ids for row in rows], device=lm.device)
        for row, said in zip(rows, _answers(lm, asking, max(asked[row].length for row in rows)), strict=True):
            right[row] = answers_with(said, asked[row].answer)
    return [prompt for prompt, known in zip(asked, right, strict=True) if known]


def answers_with(said: str, answer: str) -> bool:
    """Whether what was said begins with the answer (or is the answer's beginning, where it is shorter)."""
    said, answer = said.strip(' "').lower(), answer.lower()
    return bool(said) and (said.startswith(answer) if len(answer) < len(said) else answer.startswith(said))


def paired(prompts: Sequence[Prompt], attribute: str, pairs: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to learn a mask for an attribute on, and held-out ones: half cause, half isolation; answers differ.

    Isolation pairs ask for another attribute, the same one of both entities.
    """
    draw = random.Random(f"{seed} {attribute}")

    def drawn(names: Sequence[str], cause: bool) -> list[Pair]:
        found: list[Pair] = []
        for number in range(pairs):
            name = names[number % len(names)]
            own = [place for place, prompt in enumerate(prompts) if prompt.attribute == name]
            base = draw.choice(own)
            others = [place for place in own if prompts[place].answer != prompts[base].answer]
            if others:
                found.append(Pair(base, draw.choice(others), cause))
        return found

    rest = [name for name in dict.fromkeys(prompt.attribute for prompt in prompts) if name != attribute]
    both = drawn([attribute], True), drawn(rest, False)
    train = [pair for part in both for pair in part[: round(0.7 * len(part))]]
    held_out = [pair for part in both for pair in part[round(0.7 * len(part)) :]]
    draw.shuffle(train)
    return train, held_out


def _tokens(lm: LanguageModel, template: str, entity: str) -> tuple[tuple[int, ...], int]:
    """Tokens of a prompt, and the place of the last one of its entity."""
    text = template.format(entity)
    end = template.index("{}") + len(entity)
    encoded = lm.tokenizer(text, return_offsets_mapping=True, verbose=False)
    inside = [place for place, (first, last) in enumerate(encoded["offset_mapping"]) if first < end and last > 0]
    return tuple(encoded["input_ids"]), max(inside)


def _entities(prompts: Sequence[Prompt], attribute: str) -> int:
    return sum(prompt.attribute == attribute for prompt in prompts)


def _alike(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Places of prompts of one length, a few at a time: nothing is padded."""
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt.ids), []).append(place)
    for rows in by_length.values():
        for start in range(0, len(rows), _PROMPTS_AT_ONCE):
            yield rows[start : start + _PROMPTS_AT_ONCE]


@torch.no_grad()
def entity_activations(lm: LanguageModel, site: Site, prompts: Sequence[Prompt]) -> Float[Tensor, "prompts d"]:
    """The activation on the last token of each prompt's entity."""
    found = torch.zeros(len(prompts), site.width(lm), device=lm.device)
    for rows in _alike(prompts):
        x = capture(lm, [site], torch.tensor([prompts[row].ids for row in rows], device=lm.device))[site]
        found[rows] = x[range(len(rows)), [prompts[row].position for row in rows]].float()
    return found


# --- the mask --------------------------------------------------------------------------------------------------------


def interchanged(
    codes: Float[Tensor, "prompts units"], pairs: Sequence[Pair], mask: Float[Tensor, "units"], units: Units
) -> Float[Tensor, "pairs d"]:
    """What takes the place of the bases' activations: masked units from the source, the rest from the base, decoded."""
    base, source = codes[[pair.base for pair in pairs]], codes[[pair.source for pair in pairs]]
    return ((1 - mask) * base + mask * source) @ units.directions + units.offset


def temperatures(steps: int) -> list[float]:
    """From 1 to 1e-4, evenly on a log scale."""
    return np.logspace(0, np.log10(_COLDEST), steps).tolist()


def learned_mask(
    lm: LanguageModel,
    site: Site,
    prompts: Sequence[Prompt],
    pairs: Sequence[Pair],
    codes: Float[Tensor, "prompts units"],
    units: Units,
    *,
    batch: int = 16,
    epochs: int = 2,
    seed: int = 0,
) -> Float[Tensor, "units"]:
    """The mask's logits theta after training; positive ones are exchanged."""
    theta = torch.zeros(codes.shape[1], device=codes.device, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=1e-3)
    batches = [list(pairs[start : start + batch]) for start in range(0, len(pairs), batch)]
    schedule = iter(temperatures(epochs * len(batches)))
    for epoch in range(epochs):
        for place in np.random.default_rng([seed, epoch]).permutation(len(batches)):
            chosen = batches[place]
            mask = torch.sigmoid(theta / next(schedule))
            changed = interchanged(codes, chosen, mask, units)
            targets = [prompts[pair.source if pair.cause else pair.base].target for pair in chosen]
            optimizer.zero_grad()
            # A group of one length at a time: the same gradient as of the padded batch.
            for rows in _alike([prompts[pair.base] for pair in chosen]):
                ids = torch.tensor([prompts[chosen[row].base].ids for row in rows], device=lm.device)
                positions = [prompts[chosen[row].base].position for row in rows]
                with splice(lm, site, _put(changed[rows], positions)):
                    hidden = base_of(lm.model)(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
                logits = finish_logits(lm.model, lm.model.get_output_embeddings()(hidden).float())
                wanted = torch.tensor([targets[row] for row in rows], device=lm.device)
                loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / len(chosen)
                loss.backward(retain_graph=True)
            optimizer.step()
    return theta.detach()


def _put(changed: Float[Tensor, "rows d"], positions: list[int]) -> Callable[[Tensor], Tensor]:
    def replace(activations: Tensor) -> Tensor:
        if activations.shape[1] == 1:
            # A step of generation: the prompt, already changed, is in the cache.
            return activations
        # Without an operation in place, which gradients would trip over.
        here = torch.zeros(activations.shape[:2], device=activations.device)
        here[range(len(positions)), positions] = 1
        here = here.unsqueeze(2).to(activations.dtype)
        return activations * (1 - here) + changed.to(activations.dtype).unsqueeze(1) * here

    return replace


@torch.no_grad()
def _judge(
    lm: LanguageModel, site: Site, prompts: Sequence[Prompt], pairs: Sequence[Pair], changed: Float[Tensor, "pairs d"]
) -> tuple[float, float]:
    """Cause and isolation: the shares of answers that became, and that stayed, what they should."""
    right: dict[bool, list[bool]] = {True: [], False: []}
    for rows in _alike([prompts[pair.base] for pair in pairs]):
        ids = torch.tensor([prompts[pairs[row].base].ids for row in rows], device=lm.device)
        positions = [prompts[pairs[row].base].position for row in rows]
        wanted = [prompts[pairs[row].source if pairs[row].cause else pairs[row].base] for row in rows]
        with splice(lm, site, _put(changed[rows], positions)):
            said = _answers(lm, ids, max(prompt.length for prompt in wanted))
        for row, text, prompt in zip(rows, said, wanted, strict=True):
            right[pairs[row].cause].append(answers_with(text, prompt.answer))
    return float(np.mean(right[True])), float(np.mean(right[False]))


@torch.no_grad()
def _answers(lm: LanguageModel, ids: Int[Tensor, "rows time"], tokens: int) -> list[str]:
    """Greedy continuations of prompts of one length."""
    said, past, step = [], None, ids
    for _ in range(tokens):
        out = base_of(lm.model)(input_ids=step, past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits = finish_logits(lm.model, lm.model.get_output_embeddings()(out.last_hidden_state[:, -1]).float())
        step = logits.argmax(dim=1, keepdim=True)
        said.append(step)
    return [lm.tokenizer.decode(row) for row in torch.cat(said, dim=1).tolist()]
