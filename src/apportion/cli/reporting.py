"""The report of a run: gathers what ``apportion.report`` shows."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.features.run import PreparedStore, TrainedRun
    from apportion.models import LanguageModel, Site
    from apportion.report import ExplainedFeature, Metric

# Only what is added to the residual stream speaks the language of the unembedding.
_SPEAKS_TOKENS = ("residual", "mlp_out", "attn_out", "embeddings")


def write_run_report(
    path: Path,
    run: "TrainedRun",
    prepared: "PreparedStore",
    lm: "LanguageModel",
    others: "Sequence[Metric]" = (),
    explanations: Path | None = None,
) -> Path:
    """Write the HTML report of a run that was evaluated.

    Args:
        path: of the file.
        run: with its evaluation.
        prepared: its activations.
        lm: the model they came from.
        others: figures of other dictionaries, shown below the run's own.
        explanations: folder that ``apportion explain`` wrote; default that of the run, if it has one.

    Raises:
        InputError: the explanations are of another dictionary, or damaged.
    """
    from apportion.features import ZipfFit
    from apportion.models import Site
    from apportion.report import Metric, build_report, token_texts, write_report

    assert run.evaluation is not None
    lens = speaks_tokens(lm, Site.parse(prepared.source.target or prepared.source.site))
    zipf = run.evaluation["zipf"]
    # Examples come from all of the text; what judges the dictionary, from the held-out part alone.
    data = build_report(
        run.sae,
        prepared.store,
        held_out=prepared.test,
        # Of a dictionary that explains its own input only.
        difficulty_contexts=64 if prepared.target is None else 0,
        title=f"{Path(prepared.source.model).name} · {prepared.source.site} · {_rule_of(run.settings['recipe'])}",
        decode_tokens=token_texts(lm.tokenizer),
        lm_unembedding=lm.unembedding()[0].float() if lens else None,
        final_norm_weight=lm.final_norm_gain() if lens else None,
        summary=_summary(run, prepared),
        metrics=[
            Metric(name, metric["value"], metric["stderr"], metric["n"], metric["definition"])
            for name, metric in run.evaluation["metrics"].items()
            if metric["value"] is not None
        ]
        + list(others),
        history=[{name: value for name, value in record.items() if value is not None} for record in run.history()],
        zipf=None if zipf is None else ZipfFit(**zipf),
        explanations=_explanations(run, explanations),
        document_names=_document_names(prepared),
    )
    return write_report(path, data)


def speaks_tokens(lm: "LanguageModel", site: "Site") -> bool:
    """Whether the logit lens means anything for directions at a site."""
    return lm.is_causal and site.kind in _SPEAKS_TOKENS


def _explanations(run: "TrainedRun", folder: Path | None) -> "dict[int, ExplainedFeature]":
    from apportion.data.files import read_json
    from apportion.features.auto_interp import fingerprint_of, read_results
    from apportion.report import explained_features

    place = folder or run.folder / "explanations"
    if folder is None and not (place / "results.jsonl").exists():
        return {}
    records = read_results(place)
    settings = read_json(place / "settings.json")
    if settings["dictionary"] != fingerprint_of(run.sae):
        raise InputError(
            f"the explanations in {place} are of another dictionary: explain this one's features into another folder, "
            "or move them away"
        )
    judge = settings["judge"]
    return explained_features(records, settings["explainer"]["style"], "" if judge is None else judge["name"])


def _rule_of(recipe: Mapping[str, Any]) -> str:
    kind = " (gated)" if recipe["gated"] else " (Matryoshka)" if recipe.get("nested") else ""
    return str(recipe["rule"]["name"]) + kind


def _summary(run: "TrainedRun", prepared: "PreparedStore") -> dict[str, str | int | float]:
    recipe, source = run.settings["recipe"], prepared.source
    rule = {name: value for name, value in recipe["rule"].items() if name in ("k", "budget")}
    return {
        "model": source.model,
        "site": source.site if source.target is None else f"{source.site} to {source.target}",
        "rule": _rule_of(recipe),
        "budget": next(iter(rule.values()), recipe["target_l0"] or "set by the penalty"),
        "features": recipe["n_features"],
        "text": source.text,
        "training tokens": prepared.train.n_tokens,
        "calibration tokens": prepared.calibration.n_tokens,
        "test tokens": prepared.test.n_tokens,
        "steps": recipe["steps"],
        "tokens a step": recipe["batch_size"],
        "seed": recipe["seed"],
        "seconds of training": run.seconds,
    }


def _document_names(prepared: "PreparedStore") -> dict[int, str]:
    """Names of the documents, as long as the text is still there."""
    from apportion.data import corpus

    if prepared.source.text.startswith("hf:"):
        return {}
    wanted = set(prepared.store.documents().tolist())
    try:
        documents = enumerate(islice(corpus(prepared.source.text), max(wanted) + 1))
        return {number: document.name for number, document in documents if number in wanted}
    except InputError:
        return {}
