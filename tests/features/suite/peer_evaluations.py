"""Run by the interpreter that has SAELens, and SAEBench in the folder that APPORTION_SAE_BENCH names.

``peer_evaluations.py FOLDER``: reads what the test put there and writes ``saelens.json`` and ``saebench.json``: what
the functions of those libraries make of it. Their functions run as they are; only the models and stores that they
expect of TransformerLens are stood in for.
"""

import dataclasses
import json
import os
import sys
import types
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
overlay = os.environ.get("APPORTION_SAE_BENCH")
if overlay:
    sys.path.append(overlay)

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

HOOK = "blocks.1.hook_resid_post"


class Model:
    """A transformers model with the three calls of TransformerLens that the evaluations make."""

    def __init__(self, folder: Path, layer: int) -> None:
        import transformers

        self.inner = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        self.block = self.inner.model.layers[layer]

    def __call__(self, tokens: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.inner(input_ids=tokens).logits
        losses = -logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        return logits, losses

    def run_with_hooks(self, tokens: torch.Tensor, fwd_hooks: list, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
        ((_, hook),) = fwd_hooks

        def replace(_module: object, _args: object, output: object) -> object:
            if isinstance(output, tuple):
                return (hook(output[0], hook=None), *output[1:])
            return hook(output, hook=None)

        handle = self.block.register_forward_hook(replace)
        try:
            return self(tokens)
        finally:
            handle.remove()

    def run_with_cache(self, tokens: torch.Tensor, **_: object) -> tuple[None, dict[str, torch.Tensor]]:
        seen = {}
        handle = self.block.register_forward_hook(
            lambda _m, _a, output: seen.update({HOOK: output[0] if isinstance(output, tuple) else output})
        )
        self.inner(input_ids=tokens)
        handle.remove()
        return None, seen


def core(folder: Path, module: object, scaler: bool) -> dict[str, float]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder / "sae", dtype="float32")
    sae.cfg.metadata.hook_name = HOOK
    tokens = load_file(folder / "core.safetensors")["ids"]
    model, store = Model(folder / "model", 1), types.SimpleNamespace(get_batch_tokens=lambda _size: tokens)
    if scaler:
        from sae_lens.training.activation_scaler import ActivationScaler

        more = (ActivationScaler(),)
    else:
        # SAEBench reads these from the configuration of SAELens before version 6.
        more = ()
        sae.cfg = types.SimpleNamespace(**vars(sae.cfg), hook_name=HOOK, hook_head_index=None, hook_layer=1)
    behaviour = module.get_downstream_reconstruction_metrics(
        sae, model, store, *more, compute_kl=True, compute_ce_loss=True, n_batches=1, eval_batch_size_prompts=1
    )
    sparsity, features = module.get_sparsity_and_variance_metrics(
        sae, model, store, *more, n_batches=1, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=True, eval_batch_size_prompts=1,
        model_kwargs={},
    )  # fmt: skip
    heuristic = torch.tensor(features["consistent_activation_heuristic"])
    return behaviour | sparsity | {"consistent_activation_heuristic": float(heuristic[~heuristic.isnan()].mean())}


def weights(folder: Path, module: object) -> dict[str, float]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder / "sae", dtype="float32")
    sae.cfg = types.SimpleNamespace(**vars(sae.cfg), architecture_str="standard")
    found = module.get_featurewise_weight_based_metrics(sae)
    names = ("encoder_decoder_cosine_sim", "max_decoder_cosine_sim", "max_encoder_cosine_sim")
    return {name: sum(found[name]) / len(found[name]) for name in names}


class Affine(torch.nn.Module):
    """The interface that SAEBench asks of a dictionary: a ReLU code and an affine decoder."""

    def __init__(self, given: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.W_enc, self.W_dec = (torch.nn.Parameter(given[name]) for name in ("encoder", "decoder"))
        self.bias, self.device, self.dtype = given["bias"], torch.device("cpu"), torch.float32
        self.cfg = types.SimpleNamespace(hook_layer=0, d_sae=self.W_dec.shape[0])

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.W_enc + self.bias)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes @ self.W_dec


def sparse_probing(given: dict[str, torch.Tensor]) -> dict[str, float]:
    import sae_bench.evals.sparse_probing.probe_training as training

    found = {}
    for k in (1, 2, 5):
        labels, judged = given["probe_labels"].int(), given["probe_test_labels"].int()
        mask = training.get_top_k_mean_diff_mask(given["probe_train"], labels, k)
        train, test = (training.apply_topk_mask_reduce_dim(given[n], mask) for n in ("probe_train", "probe_test"))
        found[str(k)] = training.train_sklearn_probe(train, labels, test, judged)[1]
    return found


def scr_tpp(given: dict[str, torch.Tensor], folder: Path) -> dict[str, object]:
    import sae_bench.evals.scr_and_tpp.main as main
    import sae_bench.evals.sparse_probing.probe_training as training

    sae, found = Affine(given), {}
    probe = training.Probe(given["probe_weight"].numel(), torch.float32)
    probe.net.weight.data.copy_(given["probe_weight"][None])
    for name, spurious in (("tpp", False), ("scr", True)):
        acts = {"male / female": given["positives"], "female_data_only": given["negatives"]}
        effects = main.get_effects_per_class_precomputed_acts(sae, probe, "male / female", acts, spurious, 4)
        found[f"{name}_effects"] = effects.tolist()
        chosen = main.select_top_n_features(effects, 3, "a")
        found[f"{name}_chosen"] = chosen.nonzero()[:, 0].tolist()
        found[f"{name}_ablated"] = main.ablated_precomputed_activations(given["positives"], sae, chosen, 4).tolist()
    scores = json.loads((folder / "scores.json").read_text())
    after = {name: {2: row} for name, row in scores["tpp_after"].items()}
    found["tpp_scores"] = main.create_tpp_plotting_dict(after, scores["tpp_clean"])[1]
    found["scr_scores"] = [
        main.get_scr_plotting_dict(
            {"male / female": {2: {f"{BIASED} probe on professor / nurse data": after}},
             "professor / nurse": {2: {f"{BIASED} probe on male / female data": after}}},
            {"professor / nurse": clean, "male / female": 0.9,
             f"{BIASED} probe on professor / nurse data": biased, f"{BIASED} probe on male / female data": 0.95},
        )["scr_metric_threshold_2"]
        for clean, biased, after in scores["scr"]
    ]  # fmt: skip
    return found


BIASED = "male_professor / female_nurse"


def absorption(given: dict[str, torch.Tensor], folder: Path) -> dict[str, object]:
    import pandas as pd
    import sae_bench.evals.absorption.feature_absorption_calculator as calculator
    import sae_bench.evals.absorption.k_sparse_probing as probing

    x, sae = given["words"], Affine(given)
    model = types.SimpleNamespace()
    model.to_tokens = lambda _text: torch.zeros(1, 3)
    rows = iter(x.split(10))
    model.run_with_cache = lambda _prompts, **_: (
        None,
        {"blocks.0.hook_resid_post": next(rows)[:, None].repeat(1, 2, 1)},
    )
    words = [f"w{number}" for number in range(len(x))]
    counting = calculator.FeatureAbsorptionCalculator(
        model=model, icl_word_list=["a"], max_icl_examples=0, topk_feats=3
    )
    result = counting.calculate_absorption(
        sae, words, given["probe_weight"], given["main"].tolist(), 0, show_progress=False
    )
    f1s = json.loads((folder / "scores.json").read_text())["f1s"]
    rows = [
        {"letter": letter}
        | {f"f1_sparse_sae_{k}": f1 for k, f1 in enumerate(f1s, 1)}
        | {f"sparse_sae_k_{k}_feats": torch.arange(k) for k in range(1, len(f1s) + 1)}
        for letter in probing.LETTERS
    ]
    frame = pd.DataFrame(rows)
    probing.add_feature_splits_to_metrics_df(frame, len(f1s), 0.03)
    return {
        "fractions": [float(word.absorption_fraction) for word in result.word_results],
        "full": [bool(word.is_full_absorption) for word in result.word_results],
        "main": frame["split_feats"].iloc[0],
    }


def ravel(given: dict[str, torch.Tensor]) -> dict[str, object]:
    from sae_bench.evals.ravel.mdbm import MDBM
    from sae_bench.evals.ravel.validation import evaluate_completion

    model = types.SimpleNamespace(device=torch.device("cpu"))
    mask = MDBM(model, None, types.SimpleNamespace(llm_batch_size=1), Affine(given))
    mask.binary_mask.data.copy_(given["theta"])
    found = {}
    for name, training in (("trained", False), ("training", True)):
        mask.temperature = 0.3
        hook = mask.create_intervention_hook(given["sources"], torch.ones(len(given["sources"]), dtype=int), training)
        states = given["bases"][:, None].repeat(1, 2, 1)
        found[name] = hook(None, None, (states,))[0][:, 1].detach().tolist()
    found["temperatures"] = torch.logspace(0, torch.log10(torch.tensor(1e-4)), 7).tolist()
    found["answers"] = [
        evaluate_completion("x", label, said) for label, said in (("France", " France. It"), ("France", " Fr"),
        ("France", " Germany"), ("France", ""), ("Asia", "asia"))
    ]  # fmt: skip
    return found


def unlearning(given: dict[str, torch.Tensor], folder: Path) -> dict[str, object]:
    import pandas as pd
    import sae_bench.evals.unlearning.main as main
    from sae_bench.evals.unlearning.utils.feature_activation import get_top_features

    rows = json.loads((folder / "scores.json").read_text())["unlearning"]
    frame = pd.DataFrame([{"wmdp-bio": row[0], "all_side_effects_mcq": row[1]} for row in rows])
    chosen = get_top_features(given["forget_rate"].numpy(), given["retain_rate"].numpy(), 0.01)
    return {"chosen": chosen.tolist(), "score": float(main.get_unlearning_scores(frame))}


def main(folder: Path) -> None:
    import sae_lens.evals

    (folder / "saelens.json").write_text(json.dumps(core(folder, sae_lens.evals, True)))
    if not overlay:
        return
    # Only for the command line of SAEBench; SAELens has moved it.
    sys.modules.setdefault("sae_lens.evals", sae_lens.evals)
    import sae_bench.evals.core.main as bench

    given = load_file(folder / "bench.safetensors")
    with torch.no_grad(), mock.patch("builtins.print"):
        found = {
            "core": core(folder, bench, False),
            "weights": weights(folder, bench),
            "sparse_probing": sparse_probing(given),
            "scr_tpp": scr_tpp(given, folder),
            "absorption": absorption(given, folder),
            "ravel": ravel(given),
            "unlearning": unlearning(given, folder),
        }
    (folder / "saebench.json").write_text(json.dumps(found, default=lambda o: dataclasses.asdict(o)))


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]))
