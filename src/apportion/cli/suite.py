"""``apportion evaluate --suite``: SAEBench's evaluations, kept in the run's folder one by one."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apportion.cli.errors import about
from apportion.cli.output import answer, show
from apportion.errors import InputError

if TYPE_CHECKING:
    from apportion.features.run import TrainedRun
    from apportion.features.suite import SuiteResult

# Activations that the random dictionary's thresholds are set on.
_SAMPLE = 4096


def run_suite_of(
    run: Path,
    opened: "TrainedRun",
    *,
    names: list[str],
    size: str,
    seed: int,
    labelled: Path | None,
    unlearning_data: str | None,
    store: Path | None,
    json: bool,
    device: str,
) -> None:
    """Run evaluations on a finished run or a dictionary of one, and print them."""
    import torch

    from apportion.features.run import reopen_store
    from apportion.features.suite import SIZES, Subject, SuiteData, read_unlearning_data, run_suite
    from apportion.models import Site, load

    started = time.perf_counter()
    if size not in SIZES:
        raise InputError(f"--suite-size {size}: one of {', '.join(SIZES)}")
    if labelled is not None and not labelled.is_file():
        raise InputError(f"--labelled {labelled}: not a file: give JSON Lines with text and label")
    with about("--unlearning-data"):
        unlearning = None if unlearning_data is None else read_unlearning_data(unlearning_data)
    prepared = reopen_store(opened, store, device=device)
    source = prepared.source
    lm = load(source.model, source.model_dtype, device)
    prepared.store.check_model(lm)
    calibration = prepared.calibration
    sample = calibration.read(torch.arange(min(_SAMPLE, calibration.n_tokens)))
    subject = Subject(lm, Site.parse(source.site), opened.sae, sample, seed)
    kept = run if store is None and (run / "run.json").exists() else None
    results = run_suite(
        subject,
        SuiteData(prepared.test, labelled, unlearning),
        names,
        sizes=SIZES[size],
        seed=seed,
        folder=None if kept is None else kept / "suite",
        decided_by={"dictionary": _fingerprint(opened), "labelled": _content(labelled), "unlearning": unlearning_data},
    )
    if json:
        from apportion.studies import machine

        answer(
            {
                "command": "evaluate",
                "run": str(run),
                "seeds": [seed],
                "rows": [row for result in results.values() for row in _rows(run.name, result)],
                "suite": {name: result.to_json() for name, result in results.items()},
                "size": size,
                "seconds": round(time.perf_counter() - started, 2),
                "machine": machine(),
            }
        )
        return
    show(suite_table(results), "", *_notes(results, kept))


def suite_table(results: "dict[str, SuiteResult]") -> Any:
    """Headline figures beside those of the controls; a reason where there are none."""
    from rich.table import Table
    from rich.text import Text

    from apportion.features.suite import ACTIVATIONS, HEADLINES, RANDOM
    from apportion.report import format_with_error

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("evaluation", no_wrap=True)
    table.add_column("figure", no_wrap=True)
    for column in ("value", "± stderr", "n", "random", "activations"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, result in results.items():
        if result.not_applicable is not None:
            table.add_row(name, Text("not applicable (see below)"), "", "", "", "", "")
        for place, figure in enumerate(each for each in HEADLINES[name] if each in result.figures):
            metric = result.figures[figure]
            value, error = format_with_error(metric.value, metric.stderr)
            others = [
                f"{found[figure].value:.3g}" if figure in found else "-"
                for found in (result.controls.get(control, {}) for control in (RANDOM, ACTIVATIONS))
            ]
            table.add_row(name if place == 0 else "", Text(figure), value, error, str(metric.n), *others)
    return table


def _notes(results: "dict[str, SuiteResult]", kept: Path | None) -> list[Any]:
    from rich.text import Text

    lines = [f"{name}: {result.not_applicable}" for name, result in results.items() if result.not_applicable]
    lines += [f"{name}: {result.details['caution']}" for name, result in results.items() if "caution" in result.details]
    lines.append(
        "random: a random dictionary of the same size and L0; activations: as many dimensions of the activation"
    )
    if kept is not None:
        lines.append(f"all figures, with their definitions: {kept / 'suite'} (or --json)")
    return [Text(line) for line in lines]


def _rows(run: str, result: "SuiteResult") -> list[dict[str, Any]]:
    groups = {run: result.figures, **{f"{run}: {control}": found for control, found in result.controls.items()}}
    return [
        {
            "name": name,
            "metric": f"{result.name}/{metric.name}",
            "mean": metric.value,
            "stderr": metric.stderr,
            "n": metric.n,
        }
        for name, figures in groups.items()
        for metric in figures.values()
    ]


def _fingerprint(opened: "TrainedRun") -> str:
    """A hash of the dictionary's weights and rule: results of another one are not taken for its own."""
    import hashlib
    import json

    digest = hashlib.sha256(json.dumps(opened.sae.config()["rule"], sort_keys=True).encode())
    for name, tensor in sorted(opened.sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _content(path: Path | None) -> str | None:
    import hashlib

    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:32]
