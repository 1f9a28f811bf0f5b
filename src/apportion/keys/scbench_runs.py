"""Many of SCBench's sessions, kept on disk as they are finished."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apportion.errors import InputError
from apportion.keys.method import KeyMethod
from apportion.keys.scbench import Protocol, run_session
from apportion.keys.scbench_results import Kept, Record, Session
from apportion.keys.shared_prompt import digest_of_tensors
from apportion.models import LanguageModel


def run_bench(
    model: LanguageModel,
    sessions: Iterable[Session],
    methods: Mapping[str, KeyMethod],
    protocol: Protocol,
    *,
    folder: Path | str | None = None,
    made_by: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Record]:
    """Run many sessions; with a folder, what was finished is kept, and an interrupted benchmark goes on.

    Args:
        model: a decoder.
        sessions: see `run_session`.
        methods: likewise.
        protocol: likewise.
        folder: where results are kept; None to keep none.
        made_by: what the sessions were made with, JSON-ready; a folder is refused that was filled otherwise.
        say: told of each session before it begins.

    Raises:
        InputError: see `run_session` and `apportion.keys.scbench_results.Kept`.
    """
    identity = {} if folder is None else {name: _identity(method) for name, method in methods.items()}
    settings = {"model": model.fingerprint, "protocol": _plain(asdict(protocol)), **_plain(dict(made_by or {}))}
    kept = Kept(folder, settings, identity)
    records = []
    for session in sessions:

        def measure(session: Session, missing: list[str]) -> list[Record]:
            if say is not None:
                say(f"{session.task}, session {session.number}: {', '.join(missing)}")
            return run_session(model, session, {name: methods[name] for name in missing}, protocol)

        records += kept.run(session, measure, list(methods))
    return records


def _identity(method: KeyMethod) -> dict[str, Any]:
    fitted = digest_of_tensors(method.fitted)[:16]
    try:
        settings = _plain(method.settings())
    except InputError:
        # Made with an object that JSON cannot hold, such as a press.
        settings = repr(method)
    return {"method": method.slug, "settings": settings, "fitted": fitted}


def _plain(settings: Any) -> Any:
    """As it will be when it is read again: JSON knows no tuples."""
    return json.loads(json.dumps(settings))
