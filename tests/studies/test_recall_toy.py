"""The one-layer model that recalls."""

import pytest
import torch

from apportion.data.tasks.recall import Recall
from apportion.keys import RoutingAttention, RoutingSettings
from apportion.studies.recall_toy import RecallModel, RecallTraining, accuracy, answer_loss, train_recall

TASK = Recall(pairs=4, keys=8, values=8)
FULL = RoutingSettings(width=32, heads=2, routing_heads=0, local_window=16, window=8, clusters=2, length=16)


@pytest.mark.slow
def test_full_attention_learns_the_task_and_attention_is_what_it_takes() -> None:
    texts = TASK.draw(64, 1)
    found = {}
    for window, steps in ((16, 150), (1, 50)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = RecallModel(TASK, 32, RoutingAttention(RoutingSettings(**{**vars(FULL), "local_window": window})))
        before = accuracy(model, texts)
        train_recall(model, RecallTraining(steps, batch=16, rate=1e-2), seed=0)
        found[window] = accuracy(model, texts)
        assert before < 0.3
    assert found[16] > 0.9
    assert found[1] < 0.4  # the window holds no pair


def test_only_answers_count() -> None:
    model, texts = RecallModel(TASK, 32, RoutingAttention(FULL)), TASK.draw(3, 0)
    logits = torch.zeros(3, 16, TASK.vocabulary)
    logits[:, TASK.asked] = 50.0 * torch.nn.functional.one_hot(TASK.answers(texts), TASK.vocabulary)
    assert float(answer_loss(model, texts, logits)) < 1e-6
    # A copy of the token before is what the model's first map gives, and nothing of later ones.
    stream, _ = model.attention_input(texts)
    other = texts.clone()
    other[:, 8:] = 0
    assert torch.equal(model.attention_input(other)[0][:, :8], stream[:, :8])
