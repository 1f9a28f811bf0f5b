from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.data.tasks import Prompt, PromptPairs
from apportion.features.discrete_circuits import CodeSettings
from apportion.studies import discrete_circuits, run
from apportion.studies.discrete_circuits import CLAIM, _Choice, _on_model, _Real
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


def digits(pairs: int, seed: int) -> PromptPairs:
    """A task for a model whose tokens are bytes."""
    generator = torch.Generator().manual_seed(seed)
    texts = ["".join(map(str, row)) for row in torch.randint(0, 10, (2 * pairs, 3), generator=generator).tolist()]
    prompts = tuple(Prompt(text, ("7",), ("8",)) for text in texts)
    return PromptPairs("digits", prompts[:pairs], prompts[pairs:])


def short(**settings: Any) -> CodeSettings:
    return CodeSettings(**{"n_features": 20, "epochs": 5, **settings})


def test_every_method_is_judged_on_a_model(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = tuple(replace(task, make=digits) for task in discrete_circuits._TASKS)
    candidates = [_Choice(short(penalty=penalty), position) for penalty in (0.1, 0.01) for position in ("mean", "end")]
    monkeypatch.setattr(discrete_circuits, "_TASKS", tasks)
    monkeypatch.setattr(discrete_circuits, "_SHARES", {"top 5 %": 0.1, "top 10 %": 0.2})  # of nine heads
    monkeypatch.setattr(discrete_circuits, "CodeSettings", short)
    monkeypatch.setattr(discrete_circuits, "_candidates", lambda: candidates)
    size = _Real(model=str(tiny_llama), pairs=8, label_pairs=4, label_pairs_docstring=3, attributed_pairs=4)
    rows, comparisons, notes = _on_model(size, [0], Workbench())

    found = {(row.name, row.metric): row.mean for row in rows}
    for task in tasks:
        methods = {name.removeprefix(f"{task.name}: ") for name, _ in found if name.startswith(f"{task.name}: ")}
        assert len(methods) == 18
        for method in methods - {"the model itself", "heads drawn by chance"}:
            assert 0 <= found[f"{task.name}: {method}", "AUC, top 5 %"] <= 1
            if "half of" not in method:
                low, high = (found[f"{task.name}: {method}", f"AUC, top 5 %, {end}"] for end in ("95 % from", "to"))
                assert 0 <= low <= high <= 1
                assert found[f"{task.name}: {method}", "seconds"] > 0
        assert (f"{task.name}: heads drawn by chance", "faithfulness, best 10 %") in found
    assert sum(each.part_of_verdict for each in comparisons) == 12
    assert any("Search on IOI" in note and "12 combinations" in note for note in notes)
