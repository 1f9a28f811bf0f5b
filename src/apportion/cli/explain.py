"""``apportion explain``: what do the features of a dictionary mean, and how well do explanations hold?"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apportion.cli import options as given
from apportion.cli.errors import about
from apportion.cli.output import answer, show, tell
from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.features.auto_interp import Estimate, Explainer, Scorer, Summary
    from apportion.features.run import PreparedStore, TrainedRun
    from apportion.models import LanguageModel
    from apportion.models.chat import ChatModel

_JUDGE, _EXAMPLES, _RUN = "Judge", "Examples", "Cost and speed"
_SCORERS = (
    "detection",
    "fuzzing",
    "fuzzing-inactive",
    "simulation",
    "surprisal",
    "embedding",
    "example-embedding",
    "intervention",
)


def explain(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, or of a dictionary that one has written.")
    ],
    judge: Annotated[
        str,
        typer.Option(
            help="tokens (no model: the tokens that stand out), local:MODEL, or openai:MODEL on any server that speaks "
            "OpenAI's protocol.",
            rich_help_panel=_JUDGE,
        ),
    ] = "tokens",
    style: Annotated[
        str,
        typer.Option(help="default, activations, contrastive or contrastive-activations.", rich_help_panel=_JUDGE),
    ] = "default",
    scorers: Annotated[
        str | None,
        typer.Option(
            help=f"Some of {', '.join(_SCORERS)}; default embedding and, with a chat model, detection and fuzzing.",
            rich_help_panel=_JUDGE,
            show_default=False,
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Of the server; default $OPENAI_BASE_URL.", rich_help_panel=_JUDGE),
    ] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="The server tells log-probabilities.", rich_help_panel=_JUDGE)
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds for one attempt.", rich_help_panel=_JUDGE)] = 120.0,
    retries: Annotated[int, typer.Option(help="Further attempts.", rich_help_panel=_JUDGE)] = 4,
    encoder: Annotated[str, typer.Option(help="For scorers by embedding.", rich_help_panel=_JUDGE)] = "minilm",
    features: Annotated[
        str | None,
        typer.Option(
            help="Such as 0-999 or 3,14,15, or a number of them with a plus (+100: spread evenly); default all.",
            rich_help_panel=_EXAMPLES,
            show_default=False,
        ),
    ] = None,
    train: Annotated[int, typer.Option(help="Windows that the explainer reads.", rich_help_panel=_EXAMPLES)] = 40,
    test: Annotated[
        int,
        typer.Option(
            help="Windows with the feature to test on, and without, of each source.", rich_help_panel=_EXAMPLES
        ),
    ] = 50,
    choice: Annotated[
        str, typer.Option(help="What the explainer reads: quantiles, top, random or mix.", rich_help_panel=_EXAMPLES)
    ] = "quantiles",
    negatives: Annotated[
        str,
        typer.Option(
            help="Sources of windows without the feature: random, neighbour, cooccurring, similar.",
            rich_help_panel=_EXAMPLES,
        ),
    ] = "random",
    split: Annotated[
        str,
        typer.Option(help="What train and test windows never share: document or context.", rich_help_panel=_EXAMPLES),
    ] = "document",
    min_windows: Annotated[
        int, typer.Option(help="Leave out features that fire in fewer windows.", rich_help_panel=_EXAMPLES)
    ] = 200,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Default explanations in the run's folder, which `report` shows.", show_default=False
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Features at once.", rich_help_panel=_RUN)] = 32,
    price_in: Annotated[float, typer.Option(help="Of a million tokens read.", rich_help_panel=_RUN)] = 0.0,
    price_out: Annotated[float, typer.Option(help="Of a million tokens written.", rich_help_panel=_RUN)] = 0.0,
    max_cost: Annotated[
        float | None,
        typer.Option(help="Begin without asking if the estimate is less; stop when it is spent.", rich_help_panel=_RUN),
    ] = None,
    seconds_a_call: Annotated[float, typer.Option(help="For the estimate of the time.", rich_help_panel=_RUN)] = 1.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the estimate and leave.", rich_help_panel=_RUN)
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Begin without asking.", rich_help_panel=_RUN)] = False,
    json: given.Json = False,
    device: given.Device = "cpu",
) -> None:
    """Explain features in words, and judge the explanations on text that the explainer has not seen.

    What was finished is never asked again: run the same command to go on after Ctrl-C, a kill or a server's trouble.

    Example: [cyan]apportion explain runs/first --features +100[/cyan], then [cyan]apportion report runs/first[/cyan]
    """
    from apportion.data.files import check_writable
    from apportion.features.auto_interp import (
        ExampleSettings,
        Interpretation,
        Prices,
        collect_examples,
        interpret_features,
    )
    from apportion.features.run import open_run, reopen_store
    from apportion.models import load
    from apportion.models.sentences import SentenceEncoder
    from apportion.models.spelling import speller

    started = time.perf_counter()
    opened = open_run(run, device)
    place = out or run / "explanations"
    with about("--out" if out else "RUN"):
        check_writable(place.parent)
    settings = ExampleSettings(
        train=train,
        test=test,
        non_activating=test,
        quantiles=min(10, train, test),
        choice=choice,
        negatives=tuple(_listed(negatives)),
        near_misses=10 if "contrastive" in style else 0,
        split=split,
        min_windows=min_windows,
    )
    with about("--features"):
        wanted = _numbers(features, opened.sae.n_features)
    names = _scorer_names(scorers, judge)
    if judge == "tokens" and style != "default":
        raise InputError(f"--style {style}: the judge `tokens` has no styles; choose another --judge, or leave it out")
    prepared = reopen_store(opened, device=device)
    lm = load(prepared.source.model, prepared.source.model_dtype, device)
    chat = _judge(judge, lm, base_url, logprobs, timeout, retries, device)
    needs_encoder = {"embedding", "example-embedding"} & set(names) or "similar" in settings.negatives
    encode = SentenceEncoder(load(encoder, device=device)) if needs_encoder else None
    spell = speller(lm.tokenizer)
    interpretation = Interpretation(
        _explainer(judge, style, prepared, spell),
        [_scorer(name, encode, lm, opened, prepared, chat) for name in names],
        chat,
        spell,
    )
    examples = collect_examples(opened.sae, prepared.store, wanted, settings, embed=encode, spell=spell)
    prices = Prices(price_in, price_out)
    estimate = interpretation.estimate(examples, prices=prices, concurrency=concurrency, seconds_a_call=seconds_a_call)
    tell(_estimate_line(estimate, prices, seconds_a_call, concurrency))
    content: dict[str, Any] = {"command": "explain", "run": str(run), "estimate": estimate.to_json()}
    if dry_run:
        if json:
            answer(content)
        return
    if judge.startswith("openai:"):
        _ask_leave(yes, max_cost, estimate)
    summary = interpret_features(
        place,
        interpretation,
        examples,
        about=_about(opened, prepared),
        concurrency=concurrency,
        prices=prices,
        max_cost=max_cost,
    )
    rows = _rows(place, examples.features.tolist())
    if json:
        from apportion.studies import machine

        seconds = round(time.perf_counter() - started, 2)
        answer(
            {
                **content,
                "explanations": str(place),
                "summary": summary.to_json(),
                "rows": rows,
                "seconds": seconds,
                "machine": machine(),
            }
        )
        return
    show(_table(rows), "", _summary_line(summary), f"{place}: `apportion report {run}` shows them")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str | None, n_features: int) -> list[int]:
    """Feature numbers from what was typed."""
    if text is None:
        return list(range(n_features))
    if text.startswith("+") and text[1:].isdigit() and int(text[1:]) > 0:
        wanted = min(int(text[1:]), n_features)
        return sorted({round(place * (n_features - 1) / max(wanted - 1, 1)) for place in range(wanted)})
    found: set[int] = set()
    for part in _listed(text):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise InputError(f"{part!r} is neither a number nor a range: write such as 0-999, 3,14,15 or +100")
        found.update(range(int(first), int(last if dash else first) + 1))
    wrong = [number for number in found if number >= n_features]
    if wrong or not found:
        raise InputError(f"{text!r}: the dictionary has features 0 to {n_features - 1}")
    return sorted(found)


def _scorer_names(scorers: str | None, judge: str) -> list[str]:
    if scorers is None:
        return ["embedding"] if judge == "tokens" else ["embedding", "detection", "fuzzing"]
    names = _listed(scorers)
    unknown = [name for name in names if name not in _SCORERS]
    if unknown:
        raise InputError(f"--scorers {unknown[0]}: choose of {', '.join(_SCORERS)}")
    return names


def _judge(
    judge: str,
    lm: "LanguageModel",
    base_url: str | None,
    logprobs: bool,
    timeout: float,
    retries: int,
    device: str,
) -> "ChatModel | None":
    from apportion.models import load

    kind, _, model = judge.partition(":")
    if judge == "tokens":
        return None
    if kind == "local" and model:
        from apportion.models.local_chat import LocalChat

        with about("--judge"):
            # The model whose features they are is in memory already.
            return LocalChat(lm if model == lm.name else load(model, device=device))
    if kind == "openai" and model:
        from apportion.models.chat_server import ChatServer

        with about("--judge"):
            return ChatServer(model, base_url, timeout=timeout, retries=retries, logprobs=logprobs)
    raise InputError(f"--judge {judge}: write tokens, local:MODEL (such as local:smollm2) or openai:MODEL")


def _explainer(judge: str, style: str, prepared: "PreparedStore", spell: Any) -> "Explainer":
    from apportion.features.auto_interp import ChatExplainer, TokenShareExplainer

    if judge != "tokens":
        with about("--style"):
            return ChatExplainer(style)
    import numpy as np

    store = prepared.store
    ids, counts = np.unique(store.token_ids_of(np.arange(store.n_contexts)), return_counts=True)
    background: dict[str, int] = {}
    for token, count in zip(ids.tolist(), counts.tolist(), strict=True):
        word = " ".join(spell([token]).text.lower().split())
        background[word] = background.get(word, 0) + count
    return TokenShareExplainer(background)


def _scorer(
    name: str,
    encode: Any,
    lm: "LanguageModel",
    opened: "TrainedRun",
    prepared: "PreparedStore",
    chat: "ChatModel | None",
) -> "Scorer":
    from apportion.features.auto_interp import Detection, Embedding, Fuzzing, Intervention, Simulation, Surprisal

    if name == "intervention":
        exclusive = getattr(chat, "exclusive", None) if getattr(chat, "lm", None) is lm else None
        return Intervention(lm, prepared.source.site, opened.sae, exclusive=exclusive)
    if name in ("embedding", "example-embedding"):
        return Embedding(encode, by_examples=name == "example-embedding")
    simple: dict[str, Any] = {"detection": Detection, "simulation": Simulation, "surprisal": Surprisal}
    return simple[name]() if name in simple else Fuzzing(inactive=name == "fuzzing-inactive")


def _about(opened: "TrainedRun", prepared: "PreparedStore") -> dict[str, Any]:
    """Which dictionary and which text explanations are of."""
    from apportion.features.auto_interp import fingerprint_of

    return {"dictionary": fingerprint_of(opened.sae), "text": prepared.store.manifest["made_from"]}


def _estimate_line(estimate: "Estimate", prices: Any, seconds_a_call: float, concurrency: int) -> str:
    usage = estimate.usage
    line = f"about {usage.calls:,} questions for {estimate.features:,} features"
    if not usage.calls:
        return f"{estimate.features:,} features, no questions to a chat model"
    line += f", {usage.prompt_tokens / 1e6:.2f} million tokens read and {usage.completion_tokens / 1e6:.2f} written"
    if prices.prompt or prices.completion:
        line += f", cost {estimate.cost:.2f}"
    minutes = estimate.seconds / 60
    return line + f", {minutes:,.0f} minutes at {seconds_a_call:g} s a question and {concurrency} at once"


def _ask_leave(yes: bool, max_cost: float | None, estimate: "Estimate") -> None:
    """Make sure that somebody agreed to ask a server so much."""
    import sys

    if max_cost is not None and estimate.cost > max_cost:
        raise InputError(
            f"--max-cost {max_cost:g}: the estimate is {estimate.cost:.2f}; allow more, or take fewer --features, "
            "--test windows or --scorers"
        )
    if yes or max_cost is not None or not estimate.usage.calls:
        return
    if not sys.stdin.isatty() or not sys.stderr.isatty():
        raise InputError("a server is to be asked so much, and nobody is there to agree: add --yes, or --max-cost")
    if not typer.confirm("Begin?", err=True):
        raise typer.Abort


def _rows(folder: Path, features: list[int]) -> list[dict[str, Any]]:
    """Means over the explained features, with standard errors."""
    from apportion.features.auto_interp import read_results
    from apportion.studies.finding import Row

    found: dict[tuple[str, str], list[float]] = {}
    for feature, record in read_results(folder).items():
        if feature not in features or record["status"] != "explained":
            continue
        for name, score in record["scores"].items():
            figures = {metric: score[metric] for metric in ("auroc", "balanced_accuracy", "expected_precision")}
            figures |= {f"auroc, {source}": value["auroc"] for source, value in score["by_source"].items()}
            figures |= {metric: score["extra"].get(metric) for metric in ("nats", "control_nats", "pearson")}
            for metric, value in figures.items():
                if value is not None:
                    found.setdefault((name, metric), []).append(value)
    return [Row.of(name, metric, values).__dict__ for (name, metric), values in found.items()]


def _table(rows: list[dict[str, Any]]) -> Any:
    from apportion.report import ResultRow, result_table

    return result_table([ResultRow(**row) for row in rows]) if rows else "nothing was explained"


def _summary_line(summary: "Summary") -> str:
    said = ", ".join(f"{count:,} {status}" for status, count in summary.status.most_common())
    if summary.failures:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary.failures.most_common())
        said += f"; failures: {kinds}"
    return f"{said}; {summary.usage.calls:,} questions in {summary.seconds:.0f} s"
