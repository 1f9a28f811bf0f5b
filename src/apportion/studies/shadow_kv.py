"""Study of *ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference* (arXiv 2410.21465, 2024).

On SmolLM2. *Spectra*: how much of a text's keys and values the top directions hold, of their own and another text's.
*Selection*: attention mass and output error of decoding queries with T keys read, on recorded layers; whatever is read
counts: outliers, the prompt's end, later tokens. *Retrieval*: a number asked for of a context of prose, the question
put to the compressed context, at 12.5 % and 6.25 % of its tokens, and what of ShadowKV loses it (``shadow_kv_loss``).
*Likelihood* of what follows a context.

Settings of every method (chunk size, outliers and local chunks; page size; sinks) are chosen from three, on other texts
than those it is judged on, at the same budget: by the error of the layers' outputs, for needles by the answers'
likelihood.
"""

import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import Tensor

from apportion.data import corpus
from apportion.data.tasks.shared_context import SharedContext, needles
from apportion.keys import ComposedMemory, KeyBudget, Trace, record_trace
from apportion.keys.branches import ask_all, go_on
from apportion.keys.chunks import ChunkRule, divide
from apportion.keys.memory import MakeComposed
from apportion.keys.prompt_svd import principal_directions
from apportion.keys.shadow_kv import ShadowKV
from apportion.keys.trace import exact_weights, part_of
from apportion.models import LanguageModel, load
from apportion.ops.attend import attend
from apportion.report import ResultRow, plots
from apportion.studies.finding import Comparison, Finding, Row, Scale, collect_rows
from apportion.studies.machine import machine, one_thread
from apportion.studies.shadow_kv_loss import PARTS
from apportion.studies.shadow_kv_methods import (
    APART,
    BARE,
    BESIDE,
    EACH,
    MORE,
    MORE_PART,
    OPTIONS,
    OURS,
    PAGES,
    WINDOW,
    every_option,
    least,
    methods_at,
    taken_apart,
)
from apportion.studies.workbench import Workbench

CLAIM = (
    "Keys before their rotary embedding, of one prompt, are what low rank fits best; and chunks chosen by their mean "
    "keys beside a few outlier chunks keep attention and retrieval at a small budget, better than page bounds or a "
    "window."
)
BASELINE = "page bounds (Quest), sinks and recent tokens, random tokens at equal keys read; oracles above"

# Retrieval counts towards the verdict from so many prompts on, where dense attention answers so many of them.
_PROMPTS, _SOLVED = 50, 0.8
_TUNING = 1000
_ENERGY, _OUTLYING = "energy in 15.6 % of directions", "outliers: {} of each key-value head"
_SINK = "heads whose first chunk is one"
Measured = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class _Size:
    model: str = "smollm2"
    tokens: int = 1024  # of the texts that spectra and selection look at
    layers: tuple[int, ...] = (1, 9, 17, 25)
    tuning_layers: tuple[int, ...] = (3, 13, 23)
    prompts: tuple[int, ...] = (640, 896)  # where decoding begins
    queries: int = 8
    keys: tuple[int, ...] = (64, 128)
    words: tuple[int, ...] = (350,)  # of prose around a needle
    contexts: int = 17  # of each length and seed, with a needle and its question each
    tuning_contexts: int = 3  # with four needles and their questions each
    apart: int = 6  # of these, on which parts of ShadowKV are replaced, at the first of the shares
    shares: tuple[float, ...] = (1 / 8, 1 / 16)  # of a context's tokens, read
    following: int = 32  # tokens whose likelihood is measured


_SIZES: dict[Scale, _Size] = {
    "smoke": _Size(
        tokens=264,
        layers=(11,),
        tuning_layers=(13,),
        prompts=(256,),
        keys=(64,),
        words=(60,),
        contexts=1,
        tuning_contexts=1,
        apart=1,
        shares=(1 / 2,),
        following=4,
    ),
    "default": _Size(),
    "long": _Size(layers=tuple(range(30)), queries=16, words=(350, 900), contexts=34, apart=34, following=64),
    "gpu": _Size(layers=tuple(range(30)), queries=16, words=(350, 900, 2400), contexts=50, apart=50, following=64),
}


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure; see the module's docstring."""
    size = _SIZES[scale]
    with one_thread():
        bench.say(f"loading {size.model}")
        trials = _Trials(load(size.model, device="cuda" if scale == "gpu" else "cpu"), size)
        measured: Measured = defaultdict(lambda: defaultdict(list))
        chosen = bench.measure("choosing settings", asdict(size), trials.choose)
        for seed in seeds:
            for what, measure in (
                ("spectra", trials.spectra),
                ("selection", partial(trials.selection, chosen)),
                ("retrieval", partial(trials.retrieval, chosen)),
                ("likelihood", partial(trials.likelihood, chosen)),
            ):
                found = bench.measure(f"seed {seed}: {what}", [asdict(size), seed], partial(measure, seed))
                for name, metrics in found.items():
                    for metric, value in metrics.items():
                        measured[name][metric].append(value)
    return Finding(
        slug="shadow_kv",
        claim=CLAIM,
        rows=collect_rows(measured),
        comparisons=_claims(size, measured),
        seeds=seeds,
        seconds=bench.seconds,
        machine=machine(),
        scale=scale,
        notes=_notes(size, seeds, chosen),
        plots={"selection": _plot(size, measured)},
    )


def _cell(words: int, share: float) -> str:
    return f"needles, {words} words, {share:.2%} of keys"


# --- measurements ----------------------------------------------------------------------------------------------------


class _Trials:
    """A model and texts: tuning, seeds' own, and their counterparts come from different documents."""

    def __init__(self, lm: LanguageModel, size: _Size) -> None:
        self.lm, self.size = lm, size
        self._texts = _long_texts(lm, size.tokens + size.following + 1)
        self._traces: dict[int, Trace] = {}

    def choose(self) -> dict[str, dict[str, str]]:
        """The setting of each method with the least error at each budget, on texts that are used for nothing else."""
        size = self.size
        trace = record_trace(self.lm, [self._text(_TUNING)], tokens=size.tokens, layers=size.tuning_layers)
        chosen: dict[str, dict[str, str]] = {}
        for keys in size.keys:
            scores = _on_layers(trace, every_option(keys), size)
            chosen[f"T={keys}"] = least({name: each["output error"] for name, each in scores.items()})
        for words in size.words:
            tasks = needles(size.tuning_contexts, filler=self._texts[-2:], words=words, keys=4, turns=4, seed=_TUNING)
            losses: dict[str, dict[str, float]] = {_cell(words, share): defaultdict(float) for share in size.shares}
            for task in tasks:
                ways = {
                    (where, name): make
                    for where, share in zip(losses, size.shares, strict=True)
                    for name, make in every_option(self._keys(task, share)).items()
                }
                answers = ask_all(self.lm, task, {"\n".join(way): make for way, make in ways.items()})
                for where, name in ways:
                    losses[where][name] += sum(each.nll for each in answers[f"{where}\n{name}"])
            chosen |= {where: least(of_where) for where, of_where in losses.items()}
        return chosen

    def _keys(self, task: SharedContext, share: float) -> int:
        return int(share * len(self.lm.tokenizer(task.context)["input_ids"]))

    def spectra(self, seed: int) -> dict[str, dict[str, float]]:
        """Energy in as many directions as the default rank has, and whether the first chunk is an outlier."""
        own, other = self._trace(2 * seed), self._trace(2 * seed + 1)
        parts: dict[str, list[float]] = defaultdict(list)
        for layer in own.layers:
            rank = ShadowKV().rank_of(own.facts[layer])
            here, there = own.steps[layer][0], other.steps[layer][0]
            pairs = {
                "keys before rotation": (here.unrotated_keys(), there.unrotated_keys()),
                "keys after rotation": (here.keys, there.keys),
                "values": (here.values, there.values),
            }
            for name, (mine, theirs) in pairs.items():
                rows, foreign = (each.transpose(1, 2).flatten(2) for each in (mine, theirs))
                parts[f"spectra: {name}: own directions"].append(_energy(rows, rows, rank))
                parts[f"spectra: {name}: another text's directions"].append(_energy(rows, foreign, rank))
            for outliers in (3, 16):
                table = divide(here.keys, here.real, ChunkRule(8, 4, outliers))
                parts[_OUTLYING.format(outliers)].append(float((table.outliers == 0).any(-1).float().mean()))
        means = {name: sum(values) / len(values) for name, values in parts.items()}
        return {name: {_SINK if name.startswith("outliers") else _ENERGY: value} for name, value in means.items()}

    def selection(self, chosen: Mapping[str, Mapping[str, str]], seed: int) -> dict[str, dict[str, float]]:
        """What each method reads of recorded layers, and what decoding by itself costs ShadowKV."""
        trace, found = self._trace(2 * seed), {}
        for keys in self.size.keys:
            methods = methods_at(keys, chosen[f"T={keys}"], seed)
            for name, figures in _on_layers(trace, methods, self.size).items():
                found[f"selection, T={keys}: {name}"] = figures
        found["decoding: ShadowKV, T=64 beside outliers and local"] = _decoding(trace, self.size)
        return found

    def retrieval(self, chosen: Mapping[str, Mapping[str, str]], seed: int) -> dict[str, dict[str, float]]:
        """Exact match and likelihood of the numbers asked for."""
        size = self.size
        scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for words in size.words:
            texts = self._texts[1 - seed % 2 : -2 : 2]
            tasks = needles(size.contexts, filler=texts, words=words, keys=1, seed=seed)
            for number, task in enumerate(tasks):
                methods: dict[str, MakeComposed] = {f"needles, {words} words: dense": ComposedMemory}
                for share in size.shares:
                    where, keys = _cell(words, share), self._keys(task, share)
                    at = methods_at(keys, chosen[where], seed)
                    for elsewhere in (EACH, BARE) if share == size.shares[0] else (EACH, BARE, "random"):
                        del at[elsewhere]
                    ours = OPTIONS[OURS][chosen[where][OURS]]
                    at[BESIDE] = partial(ours, keys, counted="selected")
                    at[MORE] = partial(ours, keys, part=MORE_PART)
                    methods |= {f"{where}: {name}": make for name, make in at.items()}
                    if number < size.apart and share == size.shares[0]:
                        methods |= taken_apart(where, keys, chosen[where][OURS])
                found = ask_all(self.lm, task, methods)
                if number < size.apart:
                    # What is set beside the parts was asked the same already.
                    where = _cell(words, size.shares[0])
                    for part, name in (
                        ("dense", f"needles, {words} words: dense"),
                        (OURS, f"{where}: {OURS}"),
                        (MORE_PART, f"{where}: {MORE}"),
                    ):
                        found[f"{where}, {APART}: {part}"] = found[name]
                for name, answers in found.items():
                    scores[name]["exact match"] += [float(each.exact) for each in answers]
                    scores[name]["answer NLL"] += [each.nll for each in answers]
                    usage = answers[0].usage
                    assert usage is not None
                    scores[name]["keys read"].append(usage.share_read)
                    scores[name]["fast bytes"].append(usage.share_fast)
        return _means(scores)

    def likelihood(self, chosen: Mapping[str, Mapping[str, str]], seed: int) -> dict[str, dict[str, float]]:
        """Mean NLL of the tokens that follow a context, above dense attention's."""
        size, found = self.size, {}
        ids = self.lm.tokenizer(self._text(2 * seed), return_tensors="pt")["input_ids"][0].to(self.lm.device)
        ids = ids[: size.tokens + size.following + 1]
        context, later, targets = ids[: size.tokens], ids[size.tokens : -1], ids[size.tokens + 1 :]
        methods: dict[str, MakeComposed] = {"dense": ComposedMemory}
        keys = size.keys[-1]
        methods |= methods_at(keys, chosen[f"T={keys}"], seed)
        dense = 0.0
        for name, logits, _ in go_on(self.lm, context, later[None], methods):
            loss = float(torch.nn.functional.cross_entropy(logits[0].float(), targets))
            dense = loss if name == "dense" else dense
            found[f"likelihood, T={keys}: {name}"] = {"NLL": loss, "NLL above dense": loss - dense}
        return found

    def _text(self, number: int) -> str:
        return self._texts[-1] if number == _TUNING else self._texts[number % (len(self._texts) - 2)]

    def _trace(self, number: int) -> Trace:
        if number not in self._traces:
            if len(self._traces) == 2:
                self._traces.clear()
            self._traces[number] = record_trace(self.lm, [self._text(number)], tokens=self.size.tokens)
        return self._traces[number]


def _long_texts(lm: LanguageModel, tokens: int, count: int = 14) -> list[str]:
    """Documents of at least so many tokens."""
    long = (each.text for each in corpus("english") if len(each.text) > 4 * tokens)
    return list(islice((text for text in long if len(lm.tokenizer(text)["input_ids"]) >= tokens), count))


def _energy(rows: Tensor, others: Tensor, rank: int) -> float:
    """Share of the rows' squared norm in the top directions of others."""
    found = rows @ principal_directions(others.float(), rank)
    return float(found.square().sum() / rows.square().sum())


def _on_layers(trace: Trace, methods: Mapping[str, MakeComposed], size: _Size) -> dict[str, dict[str, float]]:
    """Mass and error of decoding queries, means over layers and places where decoding begins."""
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for layer in trace.layers:
        if layer not in (*size.layers, *size.tuning_layers):
            continue
        for step in trace.steps[layer]:
            for prompt in size.prompts:
                short = part_of(step, 0, prompt + size.queries)
                weights = exact_weights(short, prompt)
                exact = attend(short.queries[:, :, prompt:], short.keys, short.values, short.scaling, short.softcap)
                before, after = part_of(short, 0, prompt), part_of(short, prompt, prompt + size.queries)
                for name, make in methods.items():
                    memory = make(trace.facts[layer])
                    memory.take_in(before)
                    memory.close()
                    out = memory.attend(after)
                    selection = memory.newest_selection
                    assert selection is not None
                    read = selection.mask(short.new)
                    read = read.repeat_interleave(weights.shape[1] // read.shape[1], dim=1)
                    scores[name]["mass"].append(float((weights * read).sum(-1).mean()))
                    scores[name]["output error"].append(float((out - exact).norm() / exact.norm()))
                    usage = memory.usage
                    scores[name]["keys read"].append(usage.keys_read / usage.queries)
    return _means(scores)


def _decoding(trace: Trace, size: _Size) -> dict[str, float]:
    """The paper's form, token by token: chunks chosen again, and bytes."""
    scores: dict[str, list[float]] = defaultdict(list)
    prompt = size.prompts[0]
    for layer in size.layers:
        memory = ShadowKV(KeyBudget(keys=64), outliers=3).memory(trace.facts[layer])
        step = trace.steps[layer][0]
        memory.take_in(part_of(step, 0, prompt))
        for place in range(prompt, prompt + size.queries):
            memory.attend(part_of(step, place, place + 1))
        scores["hit rate"].append(memory.selector.hit_rate)  # type: ignore[union-attr]
        usage = memory.usage
        scores["fast bytes over a plain cache's"].append(usage.share_fast)
        scores["all bytes over a plain cache's"].append(usage.share_held)
        scores["bytes read over dense"].append(usage.bytes_read / usage.bytes_dense)
        scores["bytes moved over dense"].append(usage.bytes_moved / usage.bytes_dense)
    return {name: sum(values) / len(values) for name, values in scores.items()}


def _means(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    return {
        name: {metric: sum(values) / len(values) for metric, values in metrics.items()}
        for name, metrics in scores.items()
    }


# --- what it says ----------------------------------------------------------------------------------------------------


def _claims(size: _Size, measured: Measured) -> list[Comparison]:
    def of(name: str, metric: str) -> Tensor:
        return torch.tensor(measured[name][metric], dtype=torch.float64)

    spectra = {what: of(f"spectra: {what}", _ENERGY) for what in _SPECTRA}
    claims: list[tuple[str, Tensor, bool]] = [
        (f"energy: {more} hold more than {less}", spectra[more] - spectra[less], True)
        for more, less in pairwise(_SPECTRA)
    ]
    sinks = of(_OUTLYING.format(3), _SINK)
    claims.append(("the first chunk is an outlier in at least 90 % of heads", sinks - 0.9, True))
    for keys in size.keys:
        where = f"selection, T={keys}"
        for other in (PAGES, WINDOW, BARE):
            for metric, sign in (("mass", 1), ("output error", -1)):
                margin = sign * (of(f"{where}: {OURS}", metric) - of(f"{where}: {other}", metric))
                claims.append((f"{where}: {metric} of ShadowKV better than of {other}", margin, metric != "mass"))
        bare = of(f"{where}: {BARE}", "output error") - of(f"{where}: {WINDOW}", "output error")
        claims.append((f"{where}: without outliers ShadowKV is worse than {WINDOW}", bare, False))
    for words in size.words:
        dense = of(f"needles, {words} words: dense", "exact match")
        solved = float(dense.mean()) >= _SOLVED
        counted = solved and size.contexts * len(dense) >= _PROMPTS
        claims.append((f"needles, {words} words: dense attention answers at least {_SOLVED}", dense - _SOLVED, False))
        for share in size.shares:
            where = _cell(words, share)
            for name in (OURS, MORE, BESIDE, PAGES, "oracle of each key-value head"):
                kept = of(f"{where}: {name}", "exact match") - 0.95 * dense
                claims.append((f"{where}: {name} keeps 95 % of dense accuracy", kept, counted and name == OURS))
            for part in PARTS if share == size.shares[0] else ():
                apart = f"{where}, {APART}"
                gain = of(f"{apart}: {OURS}", "answer NLL") - of(f"{apart}: {part}", "answer NLL")
                claims.append((f"{apart}: {part}: answer NLL below ShadowKV's", gain, False))
            for other in (PAGES, WINDOW):
                margin = of(f"{where}: {other}", "answer NLL") - of(f"{where}: {OURS}", "answer NLL")
                claims.append((f"{where}: answer NLL of ShadowKV below {other}", margin, False))
    where = f"likelihood, T={size.keys[-1]}"
    for other in (PAGES, WINDOW, BARE):
        margin = of(f"{where}: {other}", "NLL") - of(f"{where}: {OURS}", "NLL")
        claims.append((f"{where}: NLL of ShadowKV below {other}", margin, False))
    return [Comparison.positive(claim, margin.tolist(), part_of_verdict=counted) for claim, margin, counted in claims]


_SPECTRA = (
    "keys before rotation: own directions",
    "keys before rotation: another text's directions",
    "keys after rotation: own directions",
    "values: own directions",
)


def _notes(size: _Size, seeds: list[int], chosen: Mapping[str, Mapping[str, str]]) -> list[str]:
    settings = "; ".join(
        f"{label}: " + ", ".join(f"{name} {setting}" for name, setting in of_label.items())
        for label, of_label in chosen.items()
    )
    prompts = ", ".join(f"{words} words" for words in size.words)
    return [
        f"{size.model}, English documents; one text a seed of {size.tokens} tokens, another for the other text's "
        f"directions (uncentred). Spectra: all layers, 30 of 192 directions. Selection: layers "
        f"{', '.join(map(str, size.layers))}, decoding from {', '.join(map(str, size.prompts))} tokens on, "
        f"{size.queries} queries each. Everything that is read counts as T: outliers, the prompt's end, later tokens. "
        "ShadowKV's keys are rebuilt from rank 30 of 192. Page bounds choose for each query head, ShadowKV for each "
        "key-value head.",
        "Settings chosen on other texts, out of three or four each: by output error, for needles by answer NLL: "
        f"{settings}.",
        f"Retrieval: contexts of {prompts}, {size.contexts * len(seeds)} of each, a needle in each, asked for after "
        "the context was compressed; answers are teacher-forced, so exact match is greedy decoding's. It counts from "
        f"{_PROMPTS} prompts on, where dense attention answers {_SOLVED}. The prose comes from documents of the same "
        "corpus.",
        f"Taken apart: on the first {size.apart} contexts of each seed, at the same keys read: keys of higher "
        "rank, chunks by exact attention weight (largest share of any head of the group), a list of chunks for each "
        "query head.",
        "Counted for the verdict were fixed before the first run: the order of spectra, the sink, output error against "
        "page bounds, window and no outliers, and 95 % of dense accuracy in retrieval. The length and the number of "
        "needles were chosen by dense attention alone (four needles: 0.73 to 0.88 at 150 to 300 words; one: 0.9). "
        "Earlier runs had four needles, fewer prompts, and 36 prompts of which dense attention answered 0.78 and "
        "ShadowKV 0.53; a first run with 51 prompts (0.82 of dense attention's 0.90 at 12.5 %, 0.16 at 6.25 %) chose "
        "settings for retrieval on one context, and at 6.25 % one that leaves hardly a chunk to select: now three "
        "contexts choose. Rank 60 on all prompts joined after that run. Chunks of 4 joined ShadowKV's settings after "
        "part of an early run (two seeds) in which page bounds had chosen pages of 4 and ShadowKV had no such choice, "
        "and chunks of 4 with one outlier and one local chunk when some 40 keys were to be read, which is less than "
        "three of each and a question.",
    ]


def _plot(size: _Size, measured: Measured) -> str:
    """Mass and error of every method, as SVG text."""
    rows = []
    for name, metrics in measured.items():
        where, _, method = name.partition(": ")
        if where == f"selection, T={size.keys[0]}":
            for metric in ("mass", "output error"):
                row = Row.of(method, metric, metrics[metric])
                rows.append(ResultRow(method, metric, row.mean, row.stderr, row.n))
    with tempfile.TemporaryDirectory() as folder:
        path = plots.bars_with_errors(Path(folder) / "selection.svg", rows, title=f"T={size.keys[0]} keys read")
        return path.read_text(encoding="utf-8")
