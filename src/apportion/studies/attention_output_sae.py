"""Study of *Interpreting Attention Layer Outputs with Sparse Autoencoders* (Kissane et al. 2024, arXiv 2406.17759).

A. Exactness, on SmolLM2: heads are patterns times values, the shares of a feature by head and source add up to its
   pre-activation, and so does every level of the recursive attribution. The figures are relative errors.
B. A circuit that is known, because it was trained on the spot: a two-layer attention-only model that repeats random
   blocks of tokens. Dictionaries of its last layer's heads (TopK, and the paper's L1 with resampling at the same L0)
   against random directions and the coordinate axes at the same budget. What is compared is *what* is moved (how much
   of a feature's activity is on one next token) and whether taking away the source of the largest share takes away the
   prediction. *Where* the shares come from is shown beside its random control and counted for nothing: the pattern
   localises, whatever reads.
C. The site: dictionaries of the heads side by side and of the attention's output at equal number of features, L0, steps
   and data, on SmolLM2.

The dictionaries of a part share recipe and effort; nothing was tuned but the learning rates, once, for all seeds.
"""

from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apportion.allocate import Threshold, TokenChoice
from apportion.data import corpus
from apportion.features import Recipe, SparseAutoencoder, fit_dictionary
from apportion.features.attention_attribution import RecursiveAttribution, rdfa
from apportion.features.attention_output_sae import (
    Reader,
    attribution_tables,
    direct_feature_attribution,
    localisation,
    random_attribution,
)
from apportion.features.evaluate import SplicedLoss, evaluate_reconstruction
from apportion.features.resampling import Resampling
from apportion.models import Site, cache_dir, capture, harvest, load, splice
from apportion.models.attention_only import attention_only
from apportion.models.direct_paths import DirectPaths
from apportion.models.linear import AttentionAtWork, watch_attention
from apportion.report import plots
from apportion.report.tables import ResultRow
from apportion.studies.finding import Comparison, Finding, Row, Scale, collect_rows
from apportion.studies.machine import machine, one_thread
from apportion.studies.workbench import Workbench
from apportion.training import TrainingSettings, train

CLAIM = (
    "A feature of the heads side by side is exactly a sum over heads, source positions and what lies upstream; it says "
    "what is moved (its activity concentrates on one next token) more than random or coordinate directions do, and "
    "removing its strongest source's share removes the prediction; its dictionary moves the model about as little as "
    "one of the attention's output."
)
BASELINE = (
    "random unit directions and the coordinate axes at the same L0 on a known induction circuit; dictionaries of the "
    "attention's output at equal L0 and width on SmolLM2"
)

Measured = dict[str, dict[str, list[float]]]
# A dictionary of heads may move the model by this factor more than one of the attention's output and count as alike.
_ALIKE = 1.25
_HEADS = Site(1, "heads")


@dataclass(frozen=True)
class _Circuit:
    """Section 3.7 B of the method sheet: d = 64, 4 heads, vocabulary 64, T = 48; F = 256, k = 6."""

    model_steps: int = 900
    batch: int = 32
    sequences: int = 2048
    steps: int = 700
    batch_size: int = 1024
    test_sequences: int = 512


@dataclass(frozen=True)
class _Real:
    """Parts A and C."""

    model: str = "smollm2"
    layer: int = 12
    text: str = "english"
    tokens: int = 60_000
    n_features: int = 2304
    budget: int = 16
    batch_size: int = 1024
    steps: int = 600
    learning_rate: float = 2e-3
    loss_contexts: int = 64
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def where(self) -> str:
        """The conditions in words."""
        return f"{self.model} layer {self.layer}, {self.text}"


_SIZES: dict[Scale, tuple[_Circuit, _Real | None]] = {
    "smoke": (_Circuit(model_steps=40, batch=16, sequences=128, steps=40, batch_size=256, test_sequences=64), None),
    "default": (
        _Circuit(test_sequences=256),
        _Real(tokens=24_000, n_features=1152, batch_size=512, steps=100, loss_contexts=8),
    ),
    "long": (_Circuit(), _Real(tokens=300_000)),
    "gpu": (
        _Circuit(),
        _Real(tokens=2_000_000, n_features=9216, batch_size=4096, steps=4000, learning_rate=5e-4, device="cuda"),
    ),
}


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure; see the module's docstring."""
    circuit, real = _SIZES[scale]
    measured: Measured = defaultdict(lambda: defaultdict(list))
    with one_thread():
        for seed in seeds:
            found = bench.measure(
                f"induction circuit, seed {seed}", [asdict(circuit), seed], partial(_measure_circuit, circuit, seed)
            )
            _take_in(measured, found)
    comparisons, notes = _circuit_claims(measured), _circuit_notes(circuit)
    if real is not None:
        _on_model(real, seeds, bench, measured)
        comparisons += _model_claims(real, measured)
        notes += _model_notes(real)
    rows = collect_rows(measured)
    return Finding(
        slug="attention_output_sae",
        claim=CLAIM,
        rows=rows,
        comparisons=comparisons,
        seeds=seeds,
        seconds=bench.seconds,
        machine=machine(),
        scale=scale,
        notes=notes,
        plots={"what-and-where": _picture(rows)},
    )


def _take_in(measured: Measured, found: dict[str, dict[str, float]]) -> None:
    for name, figures in found.items():
        for metric, value in figures.items():
            measured[name][metric].append(value)


# --- B: a known circuit ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Repeats:
    """Random blocks of tokens, each repeated to the end of its text."""

    ids: Tensor  # [texts, time]
    block: Tensor  # [texts], the length of each block

    @classmethod
    def draw(cls, texts: int, seed: int, time: int = 48, vocabulary: int = 64) -> "_Repeats":
        generator = torch.Generator().manual_seed(seed)
        block = torch.randint(6, 23, (texts,), generator=generator)
        tokens = torch.randint(0, vocabulary, (texts, 23), generator=generator)
        return cls(tokens.gather(1, torch.arange(time) % block[:, None]), block)

    @property
    def known(self) -> Tensor:
        """Whether the next token can be known: a whole block has been seen, and there is a next token."""
        place = torch.arange(self.ids.shape[1])
        return (place >= self.block[:, None]) & (place < self.ids.shape[1] - 1)

    def induction_sources(self, text: Tensor, position: Tensor) -> Tensor:
        """Which tokens an induction head looks at: those that followed the earlier occurrences of this one."""
        source = torch.arange(self.ids.shape[1])
        distance = position[:, None] + 1 - source
        return (distance > 0) & (distance % self.block[text][:, None] == 0)


def _measure_circuit(size: _Circuit, seed: int) -> dict[str, dict[str, float]]:
    model = _trained_model(size, seed)
    train_text, test_text = (
        _Repeats.draw(size.sequences, 2**20 + seed),
        _Repeats.draw(size.test_sequences, 2**21 + seed),
    )
    pool = _heads(model, train_text)
    dictionaries = {name: fit(size, pool, seed) for name, fit in _DICTIONARIES.items()}
    with watch_attention(model) as seen, torch.no_grad():
        logits = model(input_ids=test_text.ids).logits
    work = seen[1]
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), test_text.ids[:, 1:].flatten(), reduction="none")
    texts, positions = test_text.known.nonzero(as_tuple=True)
    attention = work.pattern[texts, :, positions] * test_text.induction_sources(texts, positions)[:, None]
    by_head = attention.sum(dim=2).mean(dim=0)
    circuit = {
        "loss where the next token is known": float(loss[test_text.known[:, :-1].flatten()].mean()),
        "attention to induction sources, mean head": float(by_head.mean()),
        "attention to induction sources, best head": float(by_head.max()),
    }
    found = {"circuit": circuit}
    for name, sae in dictionaries.items():
        found[f"circuit: {name}"] = _judge(sae, model, work, test_text, logits, seed)
    return found


def _trained_model(size: _Circuit, seed: int) -> Any:
    model = attention_only(seed=seed)

    def objective(module: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        ids, known = batch
        logits = module(input_ids=ids).logits[:, :-1]
        return nn.functional.cross_entropy(logits[known[:, :-1]], ids[:, 1:][known[:, :-1]]), {}

    def batches(step: int) -> tuple[Tensor, Tensor]:
        text = _Repeats.draw(size.batch, step + 1_000_003 * (seed + 1))
        return text.ids, text.known

    settings = TrainingSettings(steps=size.model_steps, learning_rate=5e-3, betas=(0.9, 0.98), seed=seed)
    train(model, objective, batches, settings, None, progress=False)
    return model.eval().requires_grad_(False)


def _heads(model: Any, text: _Repeats) -> Tensor:
    """Activations of the last layer's heads, where the next token can be known."""
    parts = [
        capture(model, [_HEADS], ids)[_HEADS][known]
        for ids, known in zip(text.ids.split(256), text.known.split(256), strict=True)
    ]
    return torch.cat(parts)


def _fit(size: _Circuit, pool: Tensor, seed: int, recipe: Recipe, **more: Any) -> SparseAutoencoder:
    def batches(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step + 1_000_003 * (seed + 1))
        return pool[torch.randint(len(pool), (size.batch_size,), generator=generator)]

    recipe = replace(recipe, steps=size.steps, batch_size=size.batch_size, seed=seed)
    return fit_dictionary(recipe, batches, pool.shape[1], progress=False, **more)[0]


def _topk(size: _Circuit, pool: Tensor, seed: int) -> SparseAutoencoder:
    recipe = Recipe(TokenChoice(6), 256, steps=1, learning_rate=4e-3, auxiliary="dead", dead_after=20 * size.batch_size)
    return _fit(size, pool, seed, recipe)


def _l1(size: _Circuit, pool: Tensor, seed: int) -> SparseAutoencoder:
    # The paper's way at a hundredth of its length: resampled at a quarter and a half of the run, warm again in a tenth.
    recipe = Recipe(Threshold(0.0), 256, steps=1, learning_rate=4e-3, auxiliary="none", target_l0=6, penalty=1e-2)
    resampling = Resampling(
        every=max(size.steps // 4, 1), times=2, look_back=10, cutoff=1e-4, warmup=max(size.steps // 10, 1)
    )
    return _fit(size, pool, seed, recipe, resampling=resampling, betas=(0.0, 0.999))


def _random(size: _Circuit, pool: Tensor, seed: int) -> SparseAutoencoder:
    sae = SparseAutoencoder(pool.shape[1], 256, TokenChoice(6), seed=seed + 77)
    sae.initialise_from(pool[:4096])
    return sae.eval()


@torch.no_grad()
def _axes(size: _Circuit, pool: Tensor, seed: int) -> SparseAutoencoder:
    width = pool.shape[1]
    sae = SparseAutoencoder(width, 2 * width, TokenChoice(6), seed=seed)
    sae.initialise_from(pool[:4096])
    for weight in (sae.encoder_weight, sae.decoder_weight):
        weight.copy_(torch.cat([torch.eye(width), -torch.eye(width)]))
    return sae.eval()


_DICTIONARIES = {
    "TopK": _topk,
    "L1 with resampling": _l1,
    "random directions": _random,
    "coordinate axes": _axes,
}


@torch.no_grad()
def _judge(
    sae: SparseAutoencoder, model: Any, work: AttentionAtWork, text: _Repeats, logits: Tensor, seed: int
) -> dict[str, float]:
    texts, positions = text.known.nonzero(as_tuple=True)
    z = work.heads.flatten(2)[texts, positions]
    out = sae(z)
    codes = out.codes
    fvu = (z - out.output).square().sum() / (z - z.mean(dim=0)).square().sum()
    dense = codes.to_dense()
    fires = (dense > 0).sum(dim=0)
    figures = {
        "FVU": float(fvu),
        "L0": codes.nnz / len(z),
        "dead": float((fires == 0).double().mean()),
        "purity: share of activity on one next token, median": _purity(dense, text.ids[texts, positions + 1], fires),
    }
    strongest = dense.argmax(dim=1)
    readers = torch.stack([Reader.of(sae, feature).weight for feature in range(sae.n_features)])
    biases = torch.stack([Reader.of(sae, feature).bias for feature in range(sae.n_features)])
    tables = attribution_tables(readers[strongest], work, texts, positions)
    pre = z @ sae.encoder_weight.T * sae.input_scale
    pre = pre + sae.encoder_bias - sae.encoder_weight @ sae.input_bias()
    wanted = pre.gather(1, strongest[:, None]).squeeze(1)
    sizes = tables.abs().sum(dim=(1, 2)) + biases[strongest].abs()
    figures["worst error of the sum, relative"] = float(
        ((tables.sum(dim=(1, 2)) + biases[strongest] - wanted).abs() / sizes).max()
    )
    by_source = tables.sum(dim=1)
    induction = text.induction_sources(texts, positions)
    top = by_source.argmax(dim=1)
    positive = by_source.clamp(min=0)
    share = (positive * induction).sum(dim=1) / positive.sum(dim=1).clamp(min=1e-12)
    figures["localisation: strongest source is an induction source"] = float(
        induction[torch.arange(len(top)), top].double().mean()
    )
    figures["localisation: share of what is positive on induction sources, median token"] = float(share.median())
    figures |= _drops(model, work, text, logits, by_source, seed)
    return figures


def _purity(dense: Tensor, next_tokens: Tensor, fires: Tensor) -> float:
    """The largest share of a feature's activity on one next token; the median of features that fire 20 times."""
    mass = torch.zeros(64, dense.shape[1]).index_add_(0, next_tokens, dense)
    share = mass.amax(dim=0) / mass.sum(dim=0).clamp(min=1e-12)
    alive = fires >= 20
    return float(share[alive].median()) if bool(alive.any()) else 0.0


def _drops(
    model: Any, work: AttentionAtWork, text: _Repeats, logits: Tensor, by_source: Tensor, seed: int
) -> dict[str, float]:
    """How far the right logit falls when what a source brings to one token is taken out of the heads' outputs."""
    texts, positions = text.known.nonzero(as_tuple=True)
    generator = torch.Generator().manual_seed(seed)
    # One token a text.
    order = torch.randperm(len(texts), generator=generator)
    first = torch.full((len(text.ids),), -1)
    first[texts[order]] = order
    chosen = first[first >= 0]
    text_of, position = texts[chosen], positions[chosen]
    top = by_source[chosen].argmax(dim=1)
    # Another source, all of them alike: uniform over those up to this token but the strongest.
    other = (torch.rand(len(chosen), generator=generator) * position).long()
    other = other + (other >= top).long()
    right = text.ids[text_of, position + 1]
    drops = {}
    for name, source in (("its strongest source", top), ("a random other source", other)):
        brought = (work.pattern[text_of, :, position, source][..., None] * work.values[text_of, :, source]).flatten(1)

        def without(z: Tensor, brought: Tensor = brought) -> Tensor:
            z = z.clone()
            z[text_of, position] -= brought
            return z

        with splice(model, _HEADS, without):
            changed = model(input_ids=text.ids).logits
        fall = logits[text_of, position, right] - changed[text_of, position, right]
        drops[f"drop of the right logit without {name}"] = float(fall.mean())
    return drops


def _circuit_claims(measured: Measured) -> list[Comparison]:
    def of(name: str, metric: str) -> Tensor:
        return torch.tensor(measured[f"circuit: {name}"][metric], dtype=torch.float64)

    purity = "purity: share of activity on one next token, median"
    drop = "drop of the right logit without "
    claims = [
        (
            "B: shares by head and source and the bias add up to the pre-activation (relative 1e-5)",
            1e-5 - of("TopK", "worst error of the sum, relative"),
        ),
        (
            "B: without its strongest source the right logit falls ten times as far as without another",
            of("TopK", drop + "its strongest source") - 10 * of("TopK", drop + "a random other source").abs(),
        ),
        (
            "B: purity is above 1.5 times that of random directions",
            of("TopK", purity) - 1.5 * of("random directions", purity),
        ),
        (
            "B: purity is above 1.5 times that of the coordinate axes",
            of("TopK", purity) - 1.5 * of("coordinate axes", purity),
        ),
    ]
    shown = [
        (
            "B: the L1 dictionary with resampling is as pure as TopK's, to a tenth",
            of("L1 with resampling", purity) - 0.9 * of("TopK", purity),
        )
    ]
    return [Comparison.positive(claim, margins.tolist()) for claim, margins in claims] + [
        Comparison.positive(claim, margins.tolist(), part_of_verdict=False) for claim, margins in shown
    ]


def _circuit_notes(size: _Circuit) -> list[str]:
    return [
        f"B: two attention layers, width 64, 4 heads, vocabulary 64, texts of 48; {size.model_steps} steps of "
        f"{size.batch} texts; F=256 (axes: 128), budget 6, {size.steps} steps of {size.batch_size} tokens; judged on "
        f"tokens of {size.test_sequences} texts of which a whole block was seen before.",
        "B: localisation (where a feature's value comes from) is the pattern's doing: random directions show as much "
        "of it, so it is printed beside them and no comparison counts it.",
    ]


# --- A and C: a language model ---------------------------------------------------------------------------------------


def _on_model(size: _Real, seeds: list[int], bench: Workbench, measured: Measured) -> None:
    bench.say(f"loading {size.model}")
    lm = load(size.model, dtype=size.dtype, device=size.device)
    heads, output = Site(size.layer, "heads"), Site(size.layer, "attn_out")
    bench.say(f"harvesting {size.tokens} tokens, {size.where}")
    folder = (
        cache_dir()
        / "stores"
        / f"study-attention-{size.model}-{size.layer}-{size.text}-{size.tokens}".replace("/", "-")
    )
    store = harvest(lm, [heads, output], corpus(size.text), folder, tokens=size.tokens)
    losses: dict[Site, SplicedLoss] = {}
    for seed in seeds:
        for name, site in (("heads", heads), ("attention output", output)):

            def measure(site: Site = site, seed: int = seed) -> dict[str, Any]:
                store.site = site
                train_part, held_out = store.split(0.3)
                recipe = Recipe(
                    TokenChoice(size.budget),
                    size.n_features,
                    steps=size.steps,
                    batch_size=size.batch_size,
                    learning_rate=size.learning_rate,
                    auxiliary="dead",
                    dead_after=20 * size.batch_size,
                    seed=seed,
                )
                sae, _ = fit_dictionary(
                    recipe,
                    train_part.batches(size.batch_size, seed),
                    train_part.width,
                    device=size.device,
                    progress=False,
                )
                if site not in losses:
                    losses[site] = SplicedLoss(lm, site, held_out, contexts=size.loss_contexts)
                evaluation = evaluate_reconstruction(sae, held_out, device=size.device)
                spliced = losses[site].evaluate(sae)
                figures = {each: evaluation.metrics[each].value for each in ("fvu", "l0", "dead")}
                figures |= {
                    each: spliced[each].value for each in ("ce_increase", "ce_loss_score", "ce_loss_score_mean")
                }
                figures["kl: divergence from the model itself"] = _divergence(lm, site, sae, losses[site])
                exact = _exactness(lm, sae, site, seed) if site.kind == "heads" else {}
                return {"figures": figures, "exactness": exact}

            found = bench.measure(f"{size.where}, seed {seed}: {name}", [asdict(size), seed, str(site)], measure)
            _take_in(measured, {f"{size.where}: {name}": found["figures"]})
            if found["exactness"]:
                _take_in(measured, {f"{size.where}: exactness": found["exactness"]})


@torch.no_grad()
def _divergence(lm: Any, site: Site, sae: SparseAutoencoder, spliced: SplicedLoss) -> float:
    """Mean over tokens of KL(model || model with the reconstruction spliced in), in nats, on the contexts of the loss.

    One layer's attention hardly moves the loss, which can even fall; what it moves at all is seen here.
    """
    total, tokens = 0.0, 0
    for ids, valid in zip(spliced.ids.to(lm.device), spliced.valid.to(lm.device), strict=True):

        def replace(z: Tensor, valid: Tensor = valid) -> Tensor:
            z = z.clone()
            z[0, valid] = sae(z[0, valid].float()).output.to(z.dtype)
            return z

        clean = lm.model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
        with splice(lm, site, replace):
            changed = lm.model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
        total += float(nn.functional.kl_div(changed[valid], clean[valid], reduction="sum", log_target=True))
        tokens += int(valid.sum())
    return total / tokens


_PROMPTS = (
    "When Mary and John went to the store, John gave a drink to",
    "The first chapter of the book describes the first days of the journey",
    "for name in names: print(name) for item in items: print(",
)


def _exactness(lm: Any, sae: SparseAutoencoder, site: Site, seed: int) -> dict[str, float]:
    """Relative errors of the identities on one prompt, and where values come from beside the random control."""
    assert site.layer is not None
    ids = torch.tensor(lm.tokenizer(_PROMPTS[seed % len(_PROMPTS)])["input_ids"], device=lm.device)
    with watch_attention(lm) as seen:
        z = capture(lm, [site], ids[None])[site]
    work = seen[site.layer]
    heads_error = (work.heads.flatten(2) - z).norm() / z.norm()
    # In float64, for a random encoder: what is left is the arithmetic of the attribution itself.
    exact = AttentionAtWork(work.pattern.double(), work.values.double())
    weights = torch.randn(len(ids), z.shape[2], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows, places = torch.zeros(len(ids), dtype=torch.int64), torch.arange(len(ids))
    tables = attribution_tables(weights.to(z.device), exact, rows, places)
    direct = (exact.heads.flatten(2)[0] * weights.to(z.device)).sum(dim=1)
    table_error = (tables.sum(dim=(1, 2)) - direct).abs() / tables.abs().sum(dim=(1, 2))
    attribution = RecursiveAttribution(DirectPaths(lm, ids), {site: sae})
    last = len(ids) - 1
    worst, sum_error, own = 0.0, 0.0, []
    for feature, value in attribution.features_at(site, last)[:4]:
        tree = rdfa(attribution.root(site, feature, last), depth=4, top_k=3)
        worst = max([worst, *(each.node.rounding for each in tree if each.branches)])
        shares = direct_feature_attribution(sae.to("cpu"), _on_cpu(work), feature, last)
        sum_error = max(
            sum_error, abs(shares.pre_activation - value) / float(shares.table.abs().sum() + abs(shares.bias))
        )
        own.append(float(localisation(shares.by_source)))
    random = localisation(random_attribution(work, 0, last).sum(dim=1)).mean()
    return {
        "patterns times values against the heads": float(heads_error),
        "shares by head and source against the product, float64": float(table_error.max()),
        "shares and bias against the feature's value": sum_error,
        "recursive attribution, worst level of four": worst,
        "localisation: strongest source's share of what is positive": sum(own) / max(len(own), 1),
        "localisation: the same for random directions": float(random),
    }


def _on_cpu(work: AttentionAtWork) -> AttentionAtWork:
    return AttentionAtWork(work.pattern.cpu(), work.values.cpu())


def _model_claims(size: _Real, measured: Measured) -> list[Comparison]:
    def of(name: str, metric: str) -> Tensor:
        return torch.tensor(measured[f"{size.where}: {name}"][metric], dtype=torch.float64)

    divergence = "kl: divergence from the model itself"
    exact = [
        ("patterns times values are the heads (relative 1e-4)", "patterns times values against the heads", 1e-4),
        (
            "shares by head and source add up in float64 (relative 1e-12)",
            "shares by head and source against the product, float64",
            1e-12,
        ),
        (
            "shares and bias add up to a feature's value (relative 1e-5)",
            "shares and bias against the feature's value",
            1e-5,
        ),
        (
            "every level of the recursive attribution adds up (relative 1e-5)",
            "recursive attribution, worst level of four",
            1e-5,
        ),
    ]
    return [
        *(
            Comparison.positive(f"A: {claim}", (limit - of("exactness", metric)).tolist())
            for claim, metric, limit in exact
        ),
        Comparison.positive(
            f"C: the heads' dictionary diverges at most {_ALIKE} times as far from the model as the attention output's",
            (_ALIKE * of("attention output", divergence) - of("heads", divergence)).tolist(),
        ),
    ]


def _model_notes(size: _Real) -> list[str]:
    return [
        "A: errors are relative to the sum of the sizes of the terms; float32 but for the line that says otherwise.",
        f"C: {size.where}: {size.tokens} tokens harvested, 30 % of the documents held out; F={size.n_features}, TopK "
        f"{size.budget}, {size.steps} steps of {size.batch_size}, learning rate {size.learning_rate:g}; loss "
        f"on {size.loss_contexts} held-out contexts. Compared by KL to the model itself: a first run compared loss "
        "increases, which for one layer's attention are zero to within noise, and below it. That alike means a factor "
        f"of {_ALIKE} is ours; the paper compares no sites.",
    ]


def _picture(rows: list[Row]) -> str:
    import tempfile
    from pathlib import Path

    names = {
        "purity: share of activity on one next token, median": "what: purity",
        "localisation: share of what is positive on induction sources, median token": "where: localisation",
    }
    chosen = [
        ResultRow(row.name.removeprefix("circuit: "), names[row.metric], row.mean, row.stderr, row.n)
        for row in rows
        if row.metric in names
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = plots.bars_with_errors(
            Path(folder) / "bars.svg", chosen, title="A dictionary names what is moved; the pattern says from where"
        )
        return path.read_text(encoding="utf-8")
