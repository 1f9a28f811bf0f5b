"""Ten thousand features against a misbehaving server on this machine, killed again and again.

``python -m benchmarks.explain`` prints one JSON object: questions a second, how often the run was killed, questions
that were asked twice (those under way at a kill, never those of a finished feature), and what became of all features.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from apportion.features.auto_interp import (
    ChatExplainer,
    Detection,
    Examples,
    ExampleSettings,
    Interpretation,
    Summary,
    interpret_features,
    read_results,
)
from apportion.models.chat_server import ChatServer
from apportion.models.spelling import Spelled
from benchmarks.mock_judge import MockJudge, mock_judge

FAULTS = {
    "429": 0.02,
    "500": 0.01,
    "closed": 0.01,
    "cut off": 0.005,
    "silence": 0.001,
    "refusal": 0.01,
    "nonsense": 0.02,
}
_WIDTH, _WORDS = 8, 500


def made_up_examples(features: int, windows: int = 5) -> Examples:
    """Features that fire on a word of their own, ``f123x``: windows to explain by, and of either kind to test on."""
    generator = np.random.default_rng(0)
    own = np.arange(features)
    # A table of windows for each feature, and one that all share.
    shared = generator.integers(0, _WORDS, size=(200, _WIDTH))
    mine = generator.integers(0, _WORDS, size=(features, 2 * windows, _WIDTH))
    mine[:, :, 3] = _WORDS + own[:, None]
    chosen = 200 + np.arange(features * 2 * windows).reshape(features, 2 * windows)
    activations = np.zeros((features, 2 * windows, _WIDTH), dtype=np.float16)
    activations[:, :, 3] = 1
    return Examples(
        settings=ExampleSettings(
            window=_WIDTH, train=windows, test=windows, non_activating=windows, quantiles=1, min_windows=1
        ),
        features=own,
        n_windows=np.full(features, 100),
        density=np.full(features, 1e-3),
        window_density=np.full(features, 1e-2),
        largest=np.ones(features, dtype=np.float32),
        chosen=chosen,
        quantile=np.zeros(chosen.shape, dtype=np.int8),
        activations=activations,
        negatives={"random": generator.integers(0, 200, size=(features, windows))},
        numbers=np.arange(200 + features * 2 * windows),
        token_ids=np.concatenate([shared, mine.reshape(-1, _WIDTH)]).astype(np.int32),
        documents=np.zeros(200 + features * 2 * windows, dtype=np.int64),
    )


def spell(ids: Any) -> Spelled:
    """Made-up words."""
    words = [f" f{token - _WORDS}x" if token >= _WORDS else f" w{token}" for token in ids]
    ends = np.cumsum([len(word) for word in words]).tolist()
    return Spelled("".join(words), tuple(zip([0, *ends[:-1]], ends, strict=True)))


def interpret(folder: Path, url: str, features: int, concurrency: int, timeout: float) -> Summary:
    """One run."""
    chat = ChatServer("mock", url, timeout=timeout, retries=4)
    interpretation = Interpretation(ChatExplainer(), [Detection()], chat, spell)
    return interpret_features(
        folder, interpretation, made_up_examples(features), concurrency=concurrency, progress=False
    )


def killed_runs(
    folder: Path, judge: MockJudge, features: int, concurrency: int, kills: int, timeout: float, every: float
) -> list[tuple[set[int], int]]:
    """Start runs and kill them with SIGKILL; after each: what was finished, and how long the server's log was."""
    finished = []
    waits = random.Random(0)
    for _ in range(kills):
        command = [sys.executable, "-m", "benchmarks.explain", "--folder", str(folder), "--url", judge.url]
        command += ["--features", str(features), "--concurrency", str(concurrency), "--timeout", str(timeout)]
        log = len(judge.stats()["log"])
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(judge.stats()["log"]) == log and process.poll() is None:
            time.sleep(0.1)
        time.sleep(waits.uniform(0.2, 1.8) * every)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        records = read_results(folder) if (folder / "results.jsonl").exists() else {}
        done = {feature for feature, record in records.items() if record["status"] != "failed"}
        # What the dead process had sent is answered, and logged, a moment later.
        time.sleep(0.5)
        finished.append((done, len(judge.stats()["log"])))
    return finished


def asked_again(log: list[list[str]], finished: list[tuple[set[int], int]]) -> dict[str, int]:
    """Questions about features that were finished when they were asked, and questions answered more than once."""
    late = sum(
        1 for done, length in finished for feature, _, _ in log[length:] if feature and int(feature[1:-1]) in done
    )
    answered = Counter(key for _, key, kind in log if kind in ("answered", "refusal", "nonsense"))
    return {"about finished features": late, "twice": sum(count - 1 for count in answered.values())}


def measure(features: int, concurrency: int, kills: int, timeout: float, every: float) -> dict[str, Any]:
    """The whole of it."""
    with tempfile.TemporaryDirectory() as temporary, mock_judge(FAULTS) as judge:
        folder = Path(temporary) / "explanations"
        finished = killed_runs(folder, judge, features, concurrency, kills, timeout, every)
        before = len(finished[-1][0]) if finished else 0
        started = time.perf_counter()
        summary = interpret(folder, judge.url, features, concurrency, timeout)
        seconds = time.perf_counter() - started
        stats = judge.stats()
        scores = [
            record["scores"]["detection"]["balanced_accuracy"]
            for record in read_results(folder).values()
            if record["status"] == "explained"
        ]
        return {
            "name": "explain",
            "features": features,
            "concurrency": concurrency,
            "kills": kills,
            "finished before the last run": before,
            "seconds of the last run": round(seconds, 1),
            "questions a second": round(summary.usage.calls / max(seconds, 1e-9), 1),
            "requests": len(stats["log"]),
            "faults": stats["faults"],
            "asked again": asked_again(stats["log"], finished),
            "status": dict(summary.status),
            "failures": dict(summary.failures),
            "mean balanced accuracy": float(np.mean([score for score in scores if score is not None])),
            "bytes": (folder / "results.jsonl").stat().st_size,
        }


def main() -> None:
    """Parse the command line; with ``--url`` it is one of the runs that get killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=5.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds that a run lives, on average")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--url")
    given = parser.parse_args()
    if given.url:
        interpret(given.folder, given.url, given.features, given.concurrency, given.timeout)
        return
    found = measure(given.features, given.concurrency, given.kills, given.timeout, given.every)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
