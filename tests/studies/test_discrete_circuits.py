from pathlib import Path

import torch

from apportion.features.discrete_circuits import CodeSettings
from apportion.studies import discrete_circuits, run
from apportion.studies.discrete_circuits import CLAIM, _Real, _Trials
from apportion.studies.workbench import Workbench


def test_unique_codes_find_heads_that_keep_their_mean(apportion_cache: Path) -> None:
    finding = run("discrete_circuits", "smoke", seeds=1, progress=False)
    rows = {(row.name.removeprefix("synthetic heads: "), row.metric): row.mean for row in finding.rows}
    kept, moved = "AUC, mean-preserving heads", "AUC, mean-shift heads"
    assert rows["codes, unique", kept] > 0.9
    assert rows["codes, unique", kept] > rows["mean difference", kept] + 0.15
    assert rows["mean difference", moved] > 0.99
    assert rows["codes, total variation", kept] > 0.95
    assert finding.claim == CLAIM


def test_every_method_is_judged_on_a_model(tiny_llama: Path, monkeypatch: object) -> None:
    """The model half on a random model, whose tokens are bytes: a task of digits stands in."""
    from apportion.data.tasks import Prompt, PromptPairs
    from apportion.models import load

    def digits(pairs: int, seed: int) -> PromptPairs:
        generator = torch.Generator().manual_seed(seed)
        texts = ["".join(map(str, row)) for row in torch.randint(0, 10, (2 * pairs, 3), generator=generator).tolist()]
        prompts = tuple(Prompt(text, ("7",), ("8",)) for text in texts)
        return PromptPairs("digits", prompts[:pairs], prompts[pairs:])

    size = _Real(pairs=8, label_pairs=4, attributed_pairs=4, search=False)
    trials = _Trials(load(tiny_llama), size, Workbench())
    task = discrete_circuits._Task("digits", digits)
    monkeypatch.setattr(discrete_circuits, "_SHARES", {"top 5 %": 0.1, "top 10 %": 0.2})  # type: ignore[attr-defined]
    monkeypatch.setattr(discrete_circuits, "CodeSettings", _short)  # type: ignore[attr-defined]
    once = trials.of_the_task(task)
    assert set(once["the model itself"]) >= {"top-1 accuracy", "metric"}
    figures = trials.of_the_seed(task, 0, discrete_circuits._SEARCHED)
    assert len(figures) == 15
    for method, found in figures.items():
        if method != "heads drawn by chance":
            assert 0 <= found["AUC, top 5 %, 95 % from"] <= found["AUC, top 5 %, to"] <= 1
            assert found["seconds"] > 0
    assert "faithfulness, best 10 %" in figures["heads drawn by chance"]


def _short(**settings: object) -> CodeSettings:
    return CodeSettings(**{"n_features": 20, "epochs": 5, **settings})  # type: ignore[arg-type]
