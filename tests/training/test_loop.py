"""The loop itself: what a step does, in which order, and what it refuses."""

import json
import math
import threading

import pytest
import torch
from torch import nn

from apportion.errors import InputError
from apportion.training import Hook, NonFiniteLossError
from apportion.training.loop import _to_device


def test_training_lowers_the_loss(run, regressor):
    _, result = run(None, module=regressor(64), steps=400, log_every=1)
    losses = [record["loss"] for record in result.history]
    assert result.steps_done == len(losses) == 400
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    assert result.seconds > 0


def test_steps_equal_a_loop_written_out_by_hand(run, regressor, objective, batches, same_weights):
    trained, result = run(None, warmup_fraction=0.1, decay_fraction=0.2, clip_norm=0.5, seed=3)

    module = regressor()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2, fused=True)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for step, factor in enumerate([1 / 3, 2 / 3] + [1.0] * 14 + [0.8, 0.6, 0.4, 0.2]):
            optimizer.param_groups[0]["lr"] = 1e-2 * factor
            loss, _ = objective(module, batches(step), step)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
    assert same_weights(trained, module)
    assert result.history[-1]["loss"] == loss.item()
    assert result.history[-1]["gradient_norm"] == norm.item()
    assert result.history[-1]["learning_rate"] == pytest.approx(2e-3)


def test_clipping_bounds_the_step_of_plain_descent(run, regressor):
    start = nn.utils.parameters_to_vector(regressor().parameters())

    def descent(parameters):
        return torch.optim.SGD(parameters, lr=1.0)

    module, result = run(None, steps=1, clip_norm=1e-3, optimizer=descent, warmup_fraction=0.0, decay_fraction=0.0)
    moved = nn.utils.parameters_to_vector(module.parameters()) - start
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)
    # The log has the norm before clipping, which is what tells a user whether to clip.
    assert result.history[0]["gradient_norm"] > 1e-2
    free, _ = run(None, steps=1, clip_norm=None, optimizer=descent, warmup_fraction=0.0, decay_fraction=0.0)
    freely = nn.utils.parameters_to_vector(free.parameters()) - start
    assert freely.norm().item() == pytest.approx(result.history[0]["gradient_norm"], rel=1e-4)


class Embedder(nn.Module):
    """Its gradient is sparse, and holds a row more than once."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.rows = nn.Embedding(50, 3, sparse=sparse)
        nn.init.constant_(self.rows.weight, 1.0)
        self.bias = nn.Parameter(torch.ones(3))

    def forward(self, places):
        return self.rows(places) * 2 + self.bias


def slow_descent(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


@pytest.mark.parametrize("clip_norm", [None, 0.3, 1e3])
def test_sparse_gradients_are_measured_and_clipped_like_whole_ones(run, clip_norm):
    def objective(module, batch, step):
        return module(batch).square().sum(), {}

    results = []
    for sparse in (False, True):
        module, result = run(
            None,
            module=Embedder(sparse),
            objective=objective,
            batches=lambda step: torch.tensor([3, 7, 7, 49 - step]),
            optimizer=slow_descent,
            clip_norm=clip_norm,
            steps=5,
        )
        assert module.rows.weight.grad.is_sparse == sparse
        results.append([*(each.detach() for each in module.parameters()), result.history[-1]["gradient_norm"]])
    for whole, found in zip(*results, strict=True):
        torch.testing.assert_close(found, whole)


def test_a_sparse_gradient_that_is_not_finite_stops_the_run(run):
    def objective(module, batch, step):
        return module(batch).square().sum() * (torch.inf if step == 2 else 1.0), {}

    module = Embedder(sparse=True)
    with pytest.raises(NonFiniteLossError) as stopped:
        run(
            None,
            module=module,
            objective=objective,
            batches=lambda step: torch.tensor([3, 7]),
            optimizer=slow_descent,
        )
    assert stopped.value.step == 3
    assert bool(module.rows.weight.isfinite().all())


def test_the_seed_decides_and_the_callers_random_stream_does_not_notice(run, same_weights):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one, _ = run(None, seed=5)
    assert torch.equal(torch.rand(3), expected)
    same, _ = run(None, seed=5)
    other, _ = run(None, seed=6)
    assert same_weights(one, same)
    assert not same_weights(one, other)


def test_bfloat16_runs_the_objective_under_autocast_and_keeps_float32_weights(run, objective):
    seen = []

    def watches(module, batch, step):
        seen.append(module.layers(batch[0]).dtype)
        return objective(module, batch, step)

    module, result = run(None, precision="bfloat16", objective=watches)
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert math.isfinite(result.history[-1]["loss"])


def test_module_trains_in_train_mode_and_gets_its_mode_back(run, regressor, objective):
    module, modes = regressor().eval(), []

    def watches(module, batch, step):
        modes.append(module.training)
        return objective(module, batch, step)

    run(None, module=module, objective=watches)
    assert set(modes) == {True}
    assert not module.training


def test_hooks_run_around_the_step_in_order_and_may_add_to_the_log(run, regressor):
    events = []

    class Watch(Hook):
        def before_step(self, module, step):
            weight = module.layers[0].weight
            events.append(("before", step, weight.grad.norm().item() > 1e-3, weight.detach().clone()))
            weight.grad.zero_()

        def after_step(self, module, step, metrics):
            events.append(("after", step, "size" in metrics, module.layers[0].weight.detach().clone()))
            metrics["hooked"] = step

    class Nothing(Hook):
        """Overrides neither method."""

    module, result = run(None, steps=3, log_every=1, hooks=[Nothing(), Watch()])
    assert [event[:3] for event in events] == [(when, step, True) for step in range(3) for when in ("before", "after")]
    assert [record["hooked"] for record in result.history] == [0, 1, 2]
    # The hook took this gradient away before the optimiser saw it.
    assert torch.equal(module.layers[0].weight, regressor().layers[0].weight)


def test_frozen_parameters_stay(run, regressor):
    module = regressor()
    module.layers[0].requires_grad_(False)
    run(None, module=module)
    assert torch.equal(module.layers[0].weight, regressor().layers[0].weight)
    assert not torch.equal(module.layers[3].weight, regressor().layers[3].weight)


def test_module_without_trainable_parameters_is_refused(run, regressor):
    with pytest.raises(InputError, match="Regressor has no parameter with requires_grad=True"):
        run(None, module=regressor().requires_grad_(False))


def test_metrics_are_read_back_on_logged_steps_only(run, objective):
    reads = []

    class Counted(torch.Tensor):
        def item(self):
            reads.append(1)
            return super().item()

    def counts(module, batch, step):
        loss, metrics = objective(module, batch, step)
        return loss, {"size": metrics["size"].as_subclass(Counted), "plain": 3, "share": 0.5}

    _, result = run(None, steps=20, log_every=10, objective=counts)
    assert [record["step"] for record in result.history] == [1, 10, 20]
    assert len(reads) == 3
    assert (result.history[0]["plain"], result.history[0]["share"]) == (3, 0.5)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: (loss.expand(2), {}), r"loss of shape \[2\]: it must be a scalar"),
        (lambda loss: (loss, {"dead": torch.zeros(3)}), r"metric dead has shape \[3\]"),
        (lambda loss: (loss, {"loss": 1.0, "step": 2}), r"metrics named \['loss', 'step'\].*rename"),
    ],
)
def test_objective_that_returns_the_wrong_thing_is_told(run, objective, returned, message):
    with pytest.raises(ValueError, match=message):
        run(None, objective=lambda module, batch, step: returned(objective(module, batch, step)[0]))


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_non_finite_loss_stops_the_run_at_its_step_and_keeps_the_checkpoint(
    run, tmp_path, regressor, objective, same_weights, bad
):
    module = regressor()

    def breaks(module, batch, step):
        loss, metrics = objective(module, batch, step)
        if step == 6:
            # The square root at zero: a fine loss with an infinite slope.
            loss = loss * math.nan if bad == "loss" else loss + (module.layers[0].weight[0, 0] * 0).sqrt()
        return loss, metrics

    with pytest.raises(NonFiniteLossError, match=r"at step 7: lower learning_rate=0.01.*are from before it") as caught:
        run(tmp_path, module=module, objective=breaks)
    assert caught.value.step == 7
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert isinstance(caught.value, FloatingPointError)

    undisturbed, _ = run(None)
    resumed, result = run(tmp_path)
    assert result.resumed_from == 4
    assert same_weights(undisturbed, resumed)


def test_folder_that_cannot_be_written_is_one_clear_error_before_the_first_step(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"cannot write .*choose a folder you may write to"):
            run(folder, batches=lambda step: pytest.fail("a step was taken"))
    assert (tmp_path / "file").read_text() == "in the way"


def test_stop_after_must_leave_something_to_do(run, tmp_path):
    with pytest.raises(InputError, match="stop_after=0 cannot work"):
        run(tmp_path, stop_after=0)
    _, result = run(tmp_path, stop_after=500)
    assert result.steps_done == 20


def test_folder_tells_the_settings_and_the_provenance(run, tmp_path):
    run(str(tmp_path), steps=3, provenance={"store": "abc"})
    written = json.loads((tmp_path / "settings.json").read_text())
    assert (written["steps"], written["learning_rate"], written["provenance"]) == (3, 1e-2, {"store": "abc"})
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "step-00000003").iterdir()) == [
        "module.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_training_outside_the_main_thread_works_without_signal_handlers(run, tmp_path, same_weights):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert same_weights(results[0][0], run(None)[0])


def test_batches_may_be_a_tensor_a_tuple_or_anything_else():
    tensor = torch.ones(2)
    moved = _to_device((tensor, (tensor, "name")), torch.device("meta"))
    assert moved[0].is_meta
    assert moved[1][0].is_meta
    assert moved[1][1] == "name"


def test_every_step_asks_for_its_batch_once(run, batches):
    asked = []

    def watched(step):
        asked.append(step)
        return batches(step)

    run(None, batches=watched)
    assert asked == list(range(20))


def test_a_schedule_of_ones_own_takes_the_place_of_the_settings(run):
    def rising(step: int, steps: int) -> float:
        return (step + 1) / steps

    _, result = run(None, steps=4, log_every=1, learning_rate=0.5, warmup_fraction=0.5, schedule=rising)
    assert [each["learning_rate"] for each in result.history] == [0.125, 0.25, 0.375, 0.5]
