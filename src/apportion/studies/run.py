"""Run studies, keep what they found, and write the page of results."""

from pathlib import Path
from typing import Any

import torch

from apportion.data.files import read_json, write_atomically, write_json
from apportion.errors import InputError
from apportion.models import cache_dir
from apportion.report import ResultRow, result_markdown
from apportion.studies.finding import Finding, Scale, by_condition
from apportion.studies.registry import SYSTEMS, entry
from apportion.studies.workbench import workbench

SCALES: tuple[Scale, ...] = ("smoke", "default", "long", "gpu")


def run(slug: str, scale: Scale | str = "default", seeds: list[int] | int = 3, progress: bool = True) -> Finding:
    """Run a study and keep its finding in the cache.

    Each measurement is kept as soon as it is made: a study that was interrupted goes on where it was.

    Args:
        slug: which.
        scale: ``smoke`` (seconds, shows that the code runs), ``default`` (at most 5 minutes on 2 cores), ``long`` (what
            a verdict on real activations deserves) or ``gpu``.
        seeds: their number, or which.
        progress: show it on stderr.

    Raises:
        InputError: no such study, or not built, or no such scale.
    """
    if scale not in SCALES:
        raise InputError(f"scale={scale!r}: one of {', '.join(SCALES)}")
    if scale == "gpu" and not torch.cuda.is_available():
        raise InputError("scale='gpu' needs a CUDA device and this machine has none: use --scale default or long")
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen:
        raise InputError(f"seeds={seeds}: give at least one; three or more for a verdict")
    study, folder = entry(slug).study(), _kept(slug, scale)
    with workbench(f"{slug}, scale {scale}", folder / "measured.json", progress) as bench:
        finding = study.run(scale, chosen, bench)
    for stale in folder.glob("*.svg"):
        stale.unlink()
    for name, picture in finding.plots.items():
        with write_atomically(folder / f"{name}.svg") as path:
            path.write_text(picture, encoding="utf-8")
    write_json(folder / "finding.json", finding.to_json())
    bench.clear()
    return finding


def last_finding(slug: str) -> Finding | None:
    """What this machine last found, at the largest scale it was run at; smoke runs do not count."""
    for scale in ("gpu", "long", "default"):
        path = _kept(slug, scale) / "finding.json"
        if path.exists():
            content: dict[str, Any] = read_json(path)
            plots = {each.stem: each.read_text(encoding="utf-8") for each in sorted(path.parent.glob("*.svg"))}
            return Finding.from_json({**content, "plots": plots})
    return None


def all_studies() -> list[dict[str, Any]]:
    """Every system with its verdict, ``not run`` or ``not built``."""
    rows = []
    for each in SYSTEMS:
        finding = last_finding(each.slug) if each.built else None
        state = finding.verdict if finding else ("not run" if each.built else "not built")
        rows.append({"slug": each.slug, "room": each.room, "paper": each.paper, "built": each.built, "verdict": state})
    return rows


def write_results(folder: Path | str) -> Path:
    """Write ``results.md`` and its pictures into ``folder`` from what this machine found.

    What the page says of systems that this machine has not measured stays as it is: a finding of hours on another
    machine is not lost to a rerun of one study on this one.
    """
    folder = Path(folder)
    before = _sections_of(folder / "results.md")
    lines = [
        "# Results",
        "",
        "Written by `apportion study --write` from what was measured; not edited by hand. A verdict is computed: a",
        "claim holds if the 95 % interval over seeds of every comparison that counts lies on its side of zero.",
        "",
    ]
    rows = all_studies()
    for each, row in zip(SYSTEMS, rows, strict=True):
        finding = last_finding(each.slug) if each.built else None
        if finding is not None:
            lines += _section(finding, each.paper, folder)
        elif each.built and each.slug in before:
            row["verdict"], kept = before[each.slug]
            lines += kept
    lines += ["## All systems", "", "| system | room | paper | verdict |", "|---|---|---|---|"]
    lines += [f"| `{row['slug']}` | {row['room']} | {row['paper']} | {row['verdict']} |" for row in rows]
    with write_atomically(folder / "results.md") as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "results.md"


def _sections_of(page: Path) -> dict[str, tuple[str, list[str]]]:
    """The verdict and the lines of every system's section on a page of results; nothing where there is no page."""
    sections: dict[str, tuple[str, list[str]]] = {}
    lines: list[str] | None = None
    for line in page.read_text(encoding="utf-8").splitlines() if page.exists() else ():
        if line.startswith("## "):
            slug, _, verdict = line.removeprefix("## ").partition(": ")
            lines = []
            sections[slug] = verdict, lines
        if lines is not None:
            lines.append(line)
    return sections


def _section(finding: Finding, paper: str, folder: Path) -> list[str]:
    lines = [f"## {finding.slug}: {finding.verdict}", "", f"*{paper}*", "", finding.claim, ""]
    lines += ["| claim | margin (95 % interval) | seeds | verdict |", "|---|---|---|---|"]
    for each in finding.comparisons:
        counted = "" if each.part_of_verdict else " (not counted)"
        lines.append(
            f"| {each.claim}{counted} | {each.mean:.4g} ({each.low:.4g} to {each.high:.4g}) | {each.n} "
            f"| {each.verdict} |"
        )
    lines += ["", "Means ± standard errors over seeds.", ""]
    for condition, rows in by_condition(finding.rows).items():
        cells = [ResultRow(row.name, row.metric, row.mean, row.stderr, row.n) for row in rows]
        lines += [f"### {condition}", "", result_markdown(cells)]
    lines += ["### How", ""] + [f"- {note}" for note in finding.notes]
    lines += [f"- Scale {finding.scale}, seeds {finding.seeds}, {finding.seconds:.0f} s on {finding.machine}.", ""]
    for name, picture in finding.plots.items():
        place = f"images/{finding.slug}-{name}.svg"
        with write_atomically(folder / place) as path:
            path.write_text(picture, encoding="utf-8")
        lines += [f"![{name}]({place})", ""]
    return lines


def _kept(slug: str, scale: str) -> Path:
    return cache_dir() / "findings" / slug / scale
