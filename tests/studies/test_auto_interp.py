import pytest
import torch

from apportion.models import load
from apportion.studies import auto_interp
from apportion.studies.workbench import Workbench


@pytest.mark.packaged
@pytest.mark.slow
def test_the_smoke_study_finds_that_scores_follow_the_truth():
    finding = auto_interp.run("smoke", [0, 1, 2], Workbench(None))
    rows = {(row.name, row.metric): row.mean for row in finding.rows}
    assert rows["rules, noise 0", "detection, mean of the rules"] > 0.98
    assert rows["rules, noise 0.3", "detection, mean of the rules"] == pytest.approx(0.7, abs=0.06)
    assert rows["rules, noise 0", "fuzzing-inactive, of the window"] == 0.5


def test_a_randomised_model_keeps_embeddings_and_norms_and_the_spread_of_its_weights(tiny_llama):
    lm = load(tiny_llama)
    other = auto_interp.randomised(lm)
    assert other.fingerprint != lm.fingerprint
    for (name, mine), (_, theirs) in zip(lm.model.named_parameters(), other.model.named_parameters(), strict=True):
        if mine.dim() == 1 or "embed" in name:
            assert torch.equal(mine, theirs)
        else:
            assert not torch.equal(mine, theirs)
            assert theirs.std() == pytest.approx(float(mine.std()), rel=0.1)
