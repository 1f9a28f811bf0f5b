"""Study of *SCBench: A KV Cache-Centric Analysis of Long-Context Methods* (Li et al. 2024, arXiv 2412.10319).

SmolLM2 is asked several questions about one context, by methods that forget, that quantise, and that read few keys.
What is compared: scores of the first turn, whose question is part of the prompt that is compressed, with those of later
turns and of requests to a context that was compressed alone. Two tables say which resource is equal: *bytes held*
(eviction and a quantised cache) and *keys read* (selection and eviction, each query as many).

The methods' own settings are the papers', but for SnapKV's observation window: 32 tokens are more than the questions
here, so it is chosen, on other contexts, by the loss of answers in the mode that flatters SnapKV (query-aware). Tasks
count where dense attention scores at least 0.8, on other contexts than those that are judged.
"""

import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from apportion.data import corpus
from apportion.data.tasks.cache_suite import PROSE_DOCUMENTS, SUITE
from apportion.keys import KeyBudget, KeyMethod
from apportion.keys.catalogue import CATALOGUE, method_named
from apportion.keys.scbench import Protocol
from apportion.keys.scbench_results import Session, Summary, summarise
from apportion.keys.scbench_runs import run_bench
from apportion.keys.snap_kv import SnapKV
from apportion.models import LanguageModel, load
from apportion.report import plots
from apportion.studies.finding import Comparison, Finding, Row, Scale, collect_rows
from apportion.studies.machine import machine, one_thread
from apportion.studies.workbench import Workbench

CLAIM = (
    "With one context and several questions, compression that has seen the first question collapses on those that "
    "follow, while methods that hold something of every token, or choose anew for every query, do not."
)
BASELINE = (
    "StreamingLLM, SnapKV and KeyDiff against a quantised cache (equal bytes held) and chosen keys (equal keys read)"
)

SMALL_FALL = 0.1  # of the score after the first turn, beyond that of dense attention
_TUNING_SEED = 1000
_SCREENING_SEED = 2000
_FORGET = ("streaming_llm", "snap_kv", "pyramid_kv", "knorm", "key_diff")
_QUANTISE = ("quantized_2", "quantized_4")
_SHOWN = {
    "multi_request": ("score", "loss of answers", "share held", "share read"),
    "multi_turn": ("turn 1", "later turns", "loss of answers"),
    "query_aware": ("score", "loss of answers"),
}
Figures = dict[str, dict[str, Any]]  # by method
Measured = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class _Size:
    """What is asked, of whom."""

    model: str = "smollm2"
    # What passes the screening of ``long``: dense attention is right on 0.82 of 50 other prompts of 300 words.
    tasks: tuple[str, ...] = ("needles",)
    words: int = 300
    turns: int = 4
    sessions: int = 4  # of each task and seed
    share: float = 1 / 4  # of the tokens: kept by methods that forget, read by the others
    methods: tuple[str, ...] = (
        *("dense", "streaming_llm", "snap_kv", "key_diff", "quantized_4"),
        *("oracle", "sinks_and_recent", "random", "quest", "double_sparsity"),
    )
    modes: tuple[str, ...] = ("multi_request", "multi_turn")
    windows: tuple[int, ...] = (4, 8, 16, 32)  # that SnapKV's is chosen from
    tuning_sessions: int = 2
    screening_sessions: int = 0  # of other contexts, to choose tasks by; 0 to take all of them
    good_enough: float = 0.8  # of dense attention in the screening, for a task to count
    dtype: str = "auto"
    device: str = "cpu"

    @property
    def known(self) -> list[str]:
        """The methods that this version has."""
        return [name for name in self.methods if name in CATALOGUE]


_LONG = _Size(
    tasks=tuple(name for name in SUITE if name != "repo_qa"),
    turns=5,
    sessions=5,
    methods=(
        *("dense", "streaming_llm", "snap_kv", "pyramid_kv", "knorm", "key_diff", "quantized_2", "quantized_4"),
        *("oracle", "sinks_and_recent", "random", "quest", "double_sparsity", "sparq", "loki", "shadow_kv"),
    ),
    modes=("multi_request", "multi_turn", "query_aware"),
    tuning_sessions=4,
    screening_sessions=10,
)
_SIZES: dict[Scale, tuple[_Size, ...]] = {
    "smoke": (
        _Size(
            words=60,
            turns=2,
            sessions=1,
            methods=("dense", "snap_kv", "quantized_4", "oracle"),
            windows=(4, 8),
            tuning_sessions=1,
        ),
    ),
    "default": (_Size(),),
    "long": (_LONG, replace(_LONG, share=1 / 8)),
    "gpu": (replace(_LONG, tasks=tuple(SUITE), words=5000, sessions=40, dtype="bfloat16", device="cuda"),),
}


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure; see the module's docstring."""
    rows: list[Row] = []
    comparisons: list[Comparison] = []
    notes: list[str] = []
    pictures: dict[str, str] = {}
    with one_thread():
        for size in _SIZES[scale]:
            asked = _Asked(load(size.model, size.dtype, size.device), size, bench)
            more = asked.finding(seeds)
            rows, comparisons, notes = rows + more[0], comparisons + more[1], notes + more[2]
            pictures |= more[3]
    return Finding(
        slug="scbench",
        claim=CLAIM,
        rows=rows,
        comparisons=comparisons,
        seeds=seeds,
        seconds=bench.seconds,
        machine=machine(),
        scale=scale,
        notes=notes,
        plots=pictures,
    )


class _Asked:
    """One size: its tasks asked of all its methods."""

    def __init__(self, lm: LanguageModel, size: _Size, bench: Workbench) -> None:
        self.lm, self.size, self.bench = lm, size, bench
        self.budget = KeyBudget(share=size.share)
        self.settings = [asdict(size), size.known]
        self.window = 32
        self.fitted: dict[str, KeyMethod] | None = None

    def finding(self, seeds: Sequence[int]) -> tuple[list[Row], list[Comparison], list[str], dict[str, str]]:
        losses = self._window_losses()
        self.window = int(min(losses, key=lambda window: losses[window]))
        screened = self._screened()
        tasks = [name for name in self.size.tasks if screened.get(name, 1.0) >= self.size.good_enough]
        found: dict[str, list[Figures]] = {}
        for task in tasks:
            found[task] = []
            for seed in seeds:
                what = f"{task}, share {self.size.share:g}, window {self.window}, seed {seed}"
                found[task].append(self.bench.measure(what, self.settings, partial(self._measure, task, seed)))
        dense = {task: _mean([each["dense"]["multi_request"]["score"] for each in found[task]]) for task in tasks}
        notes = self._notes(losses, screened, dense, found)
        measured: Measured = defaultdict(lambda: defaultdict(list))
        for task in tasks:
            self._collect(measured, task, found[task])
        claims = self._claims(found) if found else []
        picture = {f"turns-{round(1 / self.size.share)}": self._plot(found[tasks[0]])} if found else {}
        return collect_rows(measured), claims, notes, picture

    # --- measuring

    def _window_losses(self) -> dict[str, float]:
        """Mean loss of answers of SnapKV in the query-aware mode, for each window, on contexts of its own."""
        if not {"snap_kv", "pyramid_kv"} & set(self.size.known):
            return {"32": 0.0}

        def measure() -> dict[str, float]:
            methods = {str(window): SnapKV(self.budget, window=window) for window in self.size.windows}
            sessions = self._sessions(self.size.tasks[0], self.size.tuning_sessions, _TUNING_SEED)
            records = run_bench(self.lm, sessions, methods, Protocol(("query_aware",), steps=False))
            return {each.method: each.figures["nll"] for each in summarise(records)}

        losses: dict[str, float] = self.bench.measure("SnapKV's window", self.settings, measure)
        return losses

    def _screened(self) -> dict[str, float]:
        """What dense attention scores on each task, on contexts of its own."""
        if not self.size.screening_sessions:
            return {}

        def measure(task: str) -> float:
            sessions = self._sessions(task, self.size.screening_sessions, _SCREENING_SEED)
            records = run_bench(
                self.lm,
                sessions,
                {"dense": method_named("dense", self.budget)},
                Protocol(("multi_request",), steps=False),
            )
            return _mean([each.score for each in records])

        # The share that methods keep does not matter to dense attention.
        size = {**asdict(self.size), "share": None}
        return {
            task: self.bench.measure(f"screening {task}", [size], partial(measure, task)) for task in self.size.tasks
        }

    def _measure(self, task: str, seed: int) -> Figures:
        sessions = self._sessions(task, self.size.sessions, seed)
        protocol = Protocol(self.size.modes, steps=False)
        figures: Figures = defaultdict(dict)
        # The parts of a mixed task are told apart by `apportion bench-cache`; here they are one score.
        records = [replace(each, part="") for each in run_bench(self.lm, sessions, self._methods(), protocol)]
        for each in summarise(records):
            figures[each.method][each.mode] = _figures(each)
        return dict(figures)

    def _methods(self) -> dict[str, KeyMethod]:
        if self.fitted is None:
            self.fitted = {name: method_named(name, self.budget) for name in self.size.known}
            for method in self.fitted.values():
                if isinstance(method, SnapKV):
                    method.window = self.window
                if method.needs_fit:
                    # Other documents than those that the prose is taken from.
                    documents = islice(corpus("english"), PROSE_DOCUMENTS, PROSE_DOCUMENTS + 8)
                    method.fit(self.lm, [each.text for each in documents])
        return self.fitted

    def _sessions(self, task: str, count: int, seed: int) -> list[Session]:
        made = SUITE[task].make(count, self.size.words, self.size.turns, seed)
        return [Session(task, number, content) for number, content in enumerate(made)]

    # --- telling

    def _collect(self, measured: Measured, task: str, found: Sequence[Figures]) -> None:
        share = f"1/{round(1 / self.size.share)}"
        tables = {
            f"{task}, {share} of the bytes held": ("dense", *_FORGET, *_QUANTISE),
            f"{task}, {share} of the keys read": [name for name in self.size.known if name not in _QUANTISE],
        }
        for title, names in tables.items():
            for name in names:
                for of_seed in found if name in self.size.known else []:
                    for mode, figures in of_seed[name].items():
                        for metric in _SHOWN[mode]:
                            measured[f"{title}: {name}"][f"{mode}, {metric}"].append(figures[metric])

    def _claims(self, found: Mapping[str, Sequence[Figures]]) -> list[Comparison]:
        share = f"1/{round(1 / self.size.share)}"
        have = set(self.size.known)

        def over_tasks(margin: Any) -> list[float]:
            seeds = range(len(next(iter(found.values()))))
            return [_mean([margin(of_task[seed]) for of_task in found.values()]) for seed in seeds]

        def positive(claim: str, margin: Any, counts: bool = True) -> Comparison:
            return Comparison.positive(f"{share}: {claim}", over_tasks(margin), part_of_verdict=counts)

        claims = [
            positive("SnapKV falls after the turn whose question it has seen", lambda each: _fall(each, "snap_kv")),
            positive(
                "SnapKV answers the first question worse if it is asked after the compression",
                lambda each: each["snap_kv"]["multi_turn"]["turn 1"] - each["snap_kv"]["multi_request"]["turn 1"],
            ),
            positive(
                "equal bytes held: the 4-bit cache answers more requests than SnapKV",
                lambda each: _margin(each, "quantized_4", "snap_kv"),
            ),
            positive(
                "equal keys read: keys chosen for each query answer more requests than SnapKV",
                lambda each: _margin(each, "oracle", "snap_kv"),
            ),
        ]
        for name in ("quantized_4", "oracle"):
            claims.append(
                positive(
                    f"{name} falls by less than {SMALL_FALL} more than dense attention after the first turn",
                    lambda each, name=name: SMALL_FALL - _fall(each, name),
                )
            )
        for name in ("quest", "double_sparsity", "sparq", "loki", "shadow_kv"):
            if name in have:
                claims.append(
                    positive(
                        f"equal keys read: {name} answers more requests than SnapKV",
                        lambda each, name=name: _margin(each, name, "snap_kv"),
                        counts=False,
                    )
                )
        return claims

    def _notes(
        self,
        losses: Mapping[str, float],
        screened: Mapping[str, float],
        dense: Mapping[str, float],
        found: Mapping[str, Sequence[Figures]],
    ) -> list[str]:
        size = self.size
        held = {
            name: _mean([each[name]["multi_request"]["share held"] for of_task in found.values() for each in of_task])
            for name in size.known
            if found
        }
        notes = [
            f"{size.model}, contexts of about {size.words} words, {size.sessions} a seed and task, {size.turns} turns. "
            "Answers are fed and exact where every token is the likeliest. Later turns follow the right answers.",
            "Bytes held, of a plain cache in the model's own numbers: "
            + ", ".join(f"{name} {share:.3f}" for name, share in held.items())
            + ". With float32 numbers 4 bits are an eighth and scales a thirty-second; beside a 16-bit cache the "
            "quantised one would hold about twice that share.",
            f"SnapKV's window: {self.window}, chosen on other contexts by the query-aware loss of answers ("
            + ", ".join(f"{window}: {loss:.2f}" for window, loss in losses.items())
            + "); the paper's 32 is more than a question here has tokens. KeyDiff, StreamingLLM and the quantised "
            "cache have their papers' settings.",
        ]
        if screened:
            kept = ", ".join(f"{task} {score:.2f}" for task, score in screened.items())
            prompts = size.screening_sessions * size.turns
            notes.append(f"Dense attention on up to {prompts} other prompts of each task, to choose tasks by: {kept}.")
        for task, score in dense.items():
            notes.append(f"Dense attention on the requests of {task} that are judged: {score:.2f}.")
        return notes

    def _plot(self, found: Sequence[Figures]) -> str:
        points = []
        for name in self.size.known:
            for turn in range(len(found[0][name]["multi_turn"]["by turn"])):
                row = Row.of(name, "score", [each[name]["multi_turn"]["by turn"][turn] for each in found])
                points.append(plots.ParetoPoint(name, turn + 1, row.mean, 0.0, row.stderr or 0.0))
        with tempfile.TemporaryDirectory() as folder:
            path = plots.pareto(Path(folder) / "turns.svg", points, cost="turn", quality="exact answers")
            return path.read_text(encoding="utf-8")


def _figures(summary: Summary) -> dict[str, Any]:
    turns = [score for score in summary.by_turn if score is not None]
    found = {
        "score": summary.score,
        "turn 1": turns[0],
        "later turns": _mean(turns[1:]) if len(turns) > 1 else turns[0],
        "loss of answers": summary.figures["nll"],
        "share held": summary.figures["share_held"],
        "share read": summary.figures.get("share_read", 1.0),
    }
    return {**{name: float(value) for name, value in found.items()}, "by turn": list(summary.by_turn)}


def _fall(found: Figures, name: str) -> float:
    """By how much the score falls after the first turn, less what dense attention's falls."""

    def fall(method: str) -> float:
        figures = found[method]["multi_turn"]
        return float(figures["turn 1"] - figures["later turns"])

    return fall(name) - fall("dense")


def _margin(found: Figures, name: str, other: str) -> float:
    return float(found[name]["multi_request"]["score"] - found[other]["multi_request"]["score"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
