import shutil

import pytest
import torch

from apportion import FeatureChoice, InputError, MutualChoice, Threshold, TokenChoice
from apportion.allocate import Uniform, Zipf
from apportion.data.files import read_json
from apportion.features.jump_relu import LearnedThreshold
from apportion.features.run import (
    RULES,
    ActivationSource,
    evaluate_dictionary,
    make_recipe,
    open_run,
    prepare_store,
    reopen_store,
    spliced_loss,
    store_folder,
    train_run,
)
from apportion.models import load


def _recipe(rule="mutual", **changes):
    return make_recipe(rule, **{"width": 32, "train_tokens": 10_000, "budget": 4, **changes})


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("topk", TokenChoice(4)),
        ("mutual", MutualChoice(4)),
        ("BatchTopK", MutualChoice(4)),
        ("feature", FeatureChoice(4, profile=Zipf())),
        ("feature-uniform", FeatureChoice(4, profile=Uniform())),
        ("relu", Threshold(0.0)),
        ("gated", Threshold(0.0)),
        ("jumprelu", LearnedThreshold()),
    ],
)
def test_names_that_people_type_are_rules(name, rule):
    recipe = _recipe(name)

    assert repr(recipe.rule) == repr(rule)
    assert recipe.gated == (name == "gated")
    assert recipe.target_l0 == (None if recipe.has_budget else 4)


def test_only_feature_choice_by_zipf_begins_with_a_mutual_choice_phase():
    assert _recipe("feature").phases.mutual_fraction > 0
    assert _recipe("feature-uniform").phases.mutual_fraction == 0


def test_an_unknown_rule_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="rule 'lottery' is unknown: choose one of topk, mutual"):
        _recipe("lottery")


@pytest.mark.parametrize(
    ("tokens", "batch_size", "steps"), [(800_000, 4096, 586), (160_000, 1024, 469), (10_000, 64, 469), (64, 64, 3)]
)
def test_defaults_make_enough_steps_of_what_text_there_is(tokens, batch_size, steps):
    recipe = _recipe(train_tokens=tokens)

    assert (recipe.batch_size, recipe.steps) == (batch_size, steps)
    assert recipe.n_features == 8 * 32


def test_what_is_said_is_kept():
    recipe = _recipe(steps=7, batch_size=100, n_features=48, learning_rate=0.1, auxiliary="dead", seed=3)

    assert (recipe.steps, recipe.batch_size, recipe.n_features) == (7, 100, 48)
    assert (recipe.learning_rate, recipe.auxiliary, recipe.seed) == (0.1, "dead", 3)
    assert _recipe(epochs=2, batch_size=1000).steps == 20


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("budget", [0, -1, 257])
def test_a_budget_that_no_dictionary_can_spend_is_refused(rule, budget):
    with pytest.raises(InputError, match=rf"budget={budget}: must be above 0 and at most .* 256"):
        _recipe(rule, budget=budget)


@pytest.fixture(scope="module")
def source(tiny_llama, tmp_path_factory):
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("text")
    for name, content in sorted(topics.items(), key=lambda item: len(item[1]))[:60]:
        (folder / f"{name.replace('/', '_')}.txt").write_text(content, encoding="utf-8")
    return ActivationSource(str(tiny_llama), "layers.1.residual", str(folder), tokens=16_000, context=32)


@pytest.fixture(scope="module")
def lm(tiny_llama):
    return load(tiny_llama)


@pytest.fixture(scope="module")
def prepared(source, lm, tmp_path_factory):
    return prepare_store(source, lm=lm, folder=tmp_path_factory.mktemp("stores") / "store", progress=False)


def test_the_three_parts_share_no_document(prepared):
    parts = [set(part.documents().tolist()) for part in (prepared.train, prepared.calibration, prepared.test)]

    assert all(parts)
    assert len(set.union(*parts)) == sum(len(part) for part in parts)
    held_out = prepared.calibration.n_tokens + prepared.test.n_tokens
    assert 0.1 < held_out / prepared.store.n_tokens < 0.35


def test_the_shared_store_is_found_by_what_decides_it(source, lm, apportion_cache, tmp_path, capsys):
    first = prepare_store(source, lm=lm)
    again = prepare_store(source, lm=lm)

    assert first.store.folder == again.store.folder == store_folder(source, lm)
    assert first.store.folder.is_relative_to(apportion_cache)
    assert "harvested before" in capsys.readouterr().err


def test_another_text_in_the_same_files_is_another_store(source, lm, apportion_cache, tmp_path):
    import dataclasses

    (tmp_path / "text.txt").write_text("One two three. " * 400)
    mine = dataclasses.replace(source, text=str(tmp_path / "text.txt"))
    before = store_folder(mine, lm)
    assert store_folder(mine, lm) == before

    (tmp_path / "text.txt").write_text("Four five six. " * 400)

    assert store_folder(mine, lm) != before


def test_calibration_batches_are_the_calibration_part(prepared):
    rows = torch.cat(list(prepared.calibration_batches()))

    assert torch.equal(rows, prepared.calibration.read(torch.arange(prepared.calibration.n_tokens)))


@pytest.fixture(scope="module")
def run(prepared, lm, tmp_path_factory):
    loss = spliced_loss(prepared, lm, contexts=8)
    return train_run(
        tmp_path_factory.mktemp("runs") / "run",
        prepared,
        _recipe(steps=20, batch_size=128, n_features=64),
        judge=lambda sae: evaluate_dictionary(sae, prepared, loss),
        progress=False,
    )


def test_a_run_is_judged_by_its_calibrated_thresholds_on_text_it_never_saw(run, prepared):
    l0 = run.evaluation["metrics"]["l0"]["value"]

    assert not run.sae.training
    assert l0 == pytest.approx(4, rel=0.25)
    assert run.evaluation["tokens"] == prepared.test.n_tokens
    assert read_json(run.folder / "evaluation.json") == run.evaluation
    assert run.evaluation["loss_contexts"] == 8
    assert run.history()[-1]["step"] == 20
    assert run.seconds > 0


def test_a_run_reopened_is_the_run(run, prepared):
    again = open_run(run.folder)

    assert again.evaluation == run.evaluation
    assert all(torch.equal(a, b) for a, b in zip(again.sae.parameters(), run.sae.parameters(), strict=True))
    assert reopen_store(again).store.folder == prepared.store.folder
    assert evaluate_dictionary(again.sae, prepared, None)["metrics"]["fvu"] == run.evaluation["metrics"]["fvu"]


def test_a_store_that_is_gone_is_harvested_again_in_as_many_parts(source, lm, apportion_cache, tmp_path):
    prepared = prepare_store(source, lm=lm, folder=tmp_path / "store", parts=3, progress=False)
    assert prepared.provenance["store"]["parts"] == 3
    run = train_run(tmp_path / "run", prepared, _recipe(steps=5, batch_size=128, n_features=64), progress=False)
    shutil.rmtree(tmp_path / "store")

    again = reopen_store(open_run(run.folder), progress=False)

    assert again.store.folder.is_relative_to(apportion_cache)
    assert again.provenance == prepared.provenance
    for name in ("train", "calibration", "test"):
        assert torch.equal(getattr(again, name).documents(), getattr(prepared, name).documents())


def test_a_folder_keeps_to_one_run(run, prepared):
    with pytest.raises(InputError, match=r"recipe.batch_size \(there: 128, this run: 64\)"):
        train_run(run.folder, prepared, _recipe(steps=20, batch_size=64, n_features=64), progress=False)


def test_a_dictionary_of_another_width_is_refused(prepared):
    from apportion import SparseAutoencoder

    with pytest.raises(InputError, match=r"width 16, but .* holds width 32"):
        evaluate_dictionary(SparseAutoencoder(16, 64, MutualChoice(4)), prepared, None)


def test_a_dictionary_that_does_not_say_what_it_was_trained_on(tmp_path):
    from apportion import SparseAutoencoder

    SparseAutoencoder(32, 64, TokenChoice(4)).save(tmp_path)

    with pytest.raises(InputError, match="does not say which activations"):
        reopen_store(open_run(tmp_path))


@pytest.mark.parametrize("changes", [{"site": "layers.x"}, {"held_out": 0.0}, {"held_out": 1.0}, {"tokens": 0}])
def test_a_source_that_cannot_work_is_refused(changes):
    with pytest.raises(InputError):
        ActivationSource(**{"model": "smollm2", "site": "layers.9.residual", **changes})
