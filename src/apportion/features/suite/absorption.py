"""Absorption: a feature for "starts with L" that stays silent on words whose own features say it for it.

Chanin et al. 2024, *A is for Absorption* (arXiv 2409.14507), as in SAEBench (``sae_bench.evals.absorption``):

1. Words that are one token, in a prompt with ten examples (``{word} has the first letter: {LETTER}``), activations on
   the word; a probe a letter on them (Adam, positives weighted up).
2. Features by letter: an L1 probe on all codes ranks them, and logistic regressions are fitted on the first k of them;
   the ``main`` ones are the first k, as long as each added one raises F1 on test words by more than 0.03, k <= 10.
3. For every test word that the probe gets right (a true positive): p = x . probe direction, and for every feature
   a_j = code_j (u_j . probe direction).

``mean_full_absorption_score``: the share of true positives on which all main features are 0, and the feature of largest
a_j has a cosine of at least 0.025 with the probe and a_j >= 0.4 p.

``mean_absorption_fraction_score``: the mean of A / (A + M), M being the main features' sum of a_j, and A that of the
three largest others of cosine at least 0.1, at most p - M; 0 where A < 0.4 p or M >= p, 1 where M <= 0.

``mean_num_split_features``: the number of main features. All three are averaged over letters.

Only letters whose probe has F1 > 0.6 count, and there must be 20 of them: else there is no result, and the reason is
given. **What it means on small models.** SAEBench advises models of 1-2 billion parameters and dictionaries of 16,000
features or more; an undertrained dictionary, whose features say little about letters, scores falsely: look at
``mean_k1_f1`` (ours, F1 of the best single feature), and at the random dictionary beside it.

The arithmetic of step 3 and the choice of main features give SAEBench's numbers on the same codes
(``tests/features/suite/test_peers.py``). Ours: one set of examples for all words, so that its keys and values are
computed once (SAEBench draws examples for each word); words with a leading space only, and not all of the vocabulary;
batches of a size that makes twenty steps an epoch. Standard errors are over letters.
"""

import copy
import random
import string
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.features.evaluate import Metric
from apportion.features.suite.probes import fit_multi_probe
from apportion.features.suite.result import NotApplicable, SuiteResult, mean_metric
from apportion.features.suite.units import RANDOM, DictionaryUnits, Subject, in_blocks
from apportion.models import LanguageModel, Site
from apportion.models.families import base_of
from apportion.models.hooks import visit

LETTERS = string.ascii_lowercase
_MIN_F1, _MIN_LETTERS, _JUMP, _MAX_K = 0.6, 20, 0.03, 10
_FULL_COSINE, _FRACTION_COSINE, _SHARE, _ABSORBERS = 0.025, 0.1, 0.4, 3
_EXAMPLES = 10
_SILENT = 1e-8
_WORDS_AT_ONCE = 256
_LARGE_MODEL, _LARGE_DICTIONARY = 1_000_000_000, 16_000


def evaluate_absorption(
    subject: Subject,
    *,
    train: int = 200,
    test: int = 50,
    min_letters: int = _MIN_LETTERS,
    seed: int = 0,
) -> SuiteResult:
    """First-letter absorption of a dictionary, and of a random one.

    Args:
        subject: the dictionary and its model.
        train: words a letter to fit probes on, at most.
        test: words a letter to judge on, at most.
        min_letters: letters with a good probe that it takes (SAEBench: 20).
        seed: of words, examples and probes.

    Raises:
        NotApplicable: the model is not causal, its vocabulary lacks words, or too few letters have a good probe.
    """
    subject.check_causal()
    (train_ids, train_letters), (test_ids, test_letters) = first_letter_words(subject.lm, train, test, seed)
    prefix = _prefix(subject.lm, train_ids, train_letters, seed)
    train_x, test_x = (word_activations(subject.lm, subject.site, prefix, ids) for ids in (train_ids, test_ids))
    weight, bias = fit_multi_probe(train_x, train_letters, len(LETTERS), l2=1e-4, seed=seed)
    scores = test_x @ weight.T + bias
    f1 = {number: _f1(scores[:, number] > 0, test_letters == number) for number in range(len(LETTERS))}
    good = [number for number, score in f1.items() if score > _MIN_F1]
    if len(good) < min_letters:
        raise NotApplicable(
            f"only {len(good)} of 26 letters can be read off the activations of {subject.lm.name} at {subject.site} "
            f"(probe F1 > {_MIN_F1:g}; {min_letters} are needed), so there is no concept to be absorbed"
        )
    found = {}
    for name, units in (("", subject.dictionary()), (RANDOM, DictionaryUnits(subject.random_dictionary()))):
        codes = [_codes(units, x) for x in (train_x, test_x)]
        found[name] = _letters(codes, train_letters, test_letters, test_x, units.directions, weight, scores, good, seed)
    figures = {name: _figures(letters) for name, letters in found.items()}
    details = {
        "letters": {LETTERS[number]: letter for number, letter in found[""].items()},
        "probe_f1": {LETTERS[number]: score for number, score in f1.items()},
        "words": {"train": len(train_ids), "test": len(test_ids)},
    }
    parameters = sum(weights.numel() for weights in subject.lm.model.parameters())
    if parameters < _LARGE_MODEL or subject.sae.n_features < _LARGE_DICTIONARY:
        details["caution"] = (
            f"{parameters / 1e6:.0f} million parameters, {subject.sae.n_features:,} features: below what SAEBench "
            "advises (1-2 billion, 16,000), and small or undertrained dictionaries score falsely well"
        )
    return SuiteResult(
        "absorption",
        figures[""],
        {RANDOM: figures[RANDOM]},
        details=details,
        settings={"train": train, "test": test, "min_letters": min_letters, "seed": seed},
    )


# --- words -----------------------------------------------------------------------------------------------------------


def first_letter_words(
    lm: LanguageModel, train: int, test: int, seed: int = 0
) -> tuple[tuple[list[int], Int[Tensor, "_"]], tuple[list[int], Int[Tensor, "_"]]]:
    """Tokens that are a word with a leading space, and the numbers of their first letters, to train and to test on.

    Of a letter with few words a fifth is for testing.

    Raises:
        NotApplicable: fewer than 20 letters have five such words.
    """
    by_letter: dict[int, list[int]] = {}
    for token in range(len(lm.tokenizer)):
        text = lm.tokenizer.decode([token])
        word = text[1:]
        if text.startswith(" ") and len(word) > 1 and word.isascii() and word.isalpha():
            by_letter.setdefault(LETTERS.index(word[0].lower()), []).append(token)
    enough = {letter: tokens for letter, tokens in by_letter.items() if len(tokens) >= 5}
    if len(enough) < _MIN_LETTERS:
        raise NotApplicable(f"the vocabulary of {lm.name} has words of one token for only {len(enough)} first letters")
    parts: tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]] = ([], []), ([], [])
    for letter, tokens in sorted(enough.items()):
        random.Random(f"{seed} {letter}").shuffle(tokens)
        held_out = min(test, len(tokens) // 5)
        for part, own in zip(parts, (tokens[held_out : held_out + train], tokens[:held_out]), strict=True):
            part[0].extend(own)
            part[1].extend([letter] * len(own))
    return (parts[0][0], torch.tensor(parts[0][1])), (parts[1][0], torch.tensor(parts[1][1]))


def _prefix(lm: LanguageModel, ids: list[int], letters: Tensor, seed: int) -> list[int]:
    """Ten examples, of ten letters."""
    order = list(range(len(ids)))
    random.Random(f"examples {seed}").shuffle(order)
    lines: list[str] = []
    used = set()
    for place in order:
        letter = LETTERS[int(letters[place])].upper()
        if letter not in used and len(lines) < _EXAMPLES:
            used.add(letter)
            lines.append(f"{lm.tokenizer.decode([ids[place]])} has the first letter: {letter}")
    return list(lm.tokenizer("\n" + "\n".join(lines) + "\n", verbose=False)["input_ids"])


@torch.no_grad()
def word_activations(lm: LanguageModel, site: Site, prefix: list[int], ids: list[int]) -> Float[Tensor, "words d"]:
    """The activations on each word after the same prefix, whose keys and values are computed once."""
    base = base_of(lm.model)
    past = base(input_ids=torch.tensor([prefix], device=lm.device), use_cache=True).past_key_values
    kept: list[Tensor] = []

    def keep(activations: Tensor) -> None:
        kept.append(activations[:, -1].float().clone())

    with visit(lm, site, keep):
        for start in range(0, len(ids), _WORDS_AT_ONCE):
            words = torch.tensor(ids[start : start + _WORDS_AT_ONCE], device=lm.device).unsqueeze(1)
            cache = copy.deepcopy(past)
            cache.batch_repeat_interleave(len(words))
            mask = torch.ones(len(words), len(prefix) + 1, dtype=torch.int64, device=lm.device)
            base(input_ids=words, attention_mask=mask, past_key_values=cache, use_cache=True)
    return torch.cat(kept)


def _codes(units: DictionaryUnits, x: Tensor) -> Tensor:
    return torch.cat([units.encode(x[part]) for part in in_blocks(len(x), len(units.directions))])


# --- letters ---------------------------------------------------------------------------------------------------------


def main_features(f1_by_k: Sequence[float], ranked: Sequence[int], jump: float = _JUMP) -> list[int]:
    """The first features of a ranking, as many as each raise F1 by more than ``jump``.

    Args:
        f1_by_k: F1 of a probe on the first 1, 2, ... features.
        ranked: the features, best first.
        jump: what an added feature must bring.
    """
    best, main = -100.0, 0
    for k, f1 in enumerate(f1_by_k, 1):
        if f1 <= best + jump:
            break
        best, main = f1, k
    return list(ranked[:main])


def word_absorption(
    x: Float[Tensor, "d"],
    codes: Float[Tensor, "units"],
    directions: Float[Tensor, "units d"],
    probe: Float[Tensor, "d"],
    main: Sequence[int],
) -> tuple[float, bool]:
    """The absorption fraction of a word, and whether it is fully absorbed, see the module."""
    probe = probe / probe.norm()
    along = directions @ probe
    cosine = along / directions.norm(dim=1).clamp(min=1e-12)
    shares = codes * along
    whole = float(x @ probe)
    mains = torch.tensor(list(main), dtype=torch.int64, device=codes.device)
    by_main = float(shares[mains].sum())
    others = (cosine >= _FRACTION_COSINE) & (shares > 0)
    others[mains] = False
    candidates = shares[others]
    absorbed = float(candidates.topk(min(_ABSORBERS, len(candidates))).values.sum())
    if by_main >= whole or absorbed / whole < _SHARE:
        fraction = 0.0
    elif by_main <= 0:
        fraction = 1.0
    else:
        absorbed = min(absorbed, whole - by_main)
        fraction = min(max(absorbed / (absorbed + by_main), 0.0), 1.0)
    top = int(shares.argmax())
    full = (
        bool((codes[mains] < _SILENT).all())
        and float(cosine[top]) >= _FULL_COSINE
        and whole >= 0
        and float(shares[top]) / whole >= _SHARE
    )
    return fraction, full


def _letters(
    codes: list[Tensor],
    train_letters: Tensor,
    test_letters: Tensor,
    test_x: Tensor,
    directions: Tensor,
    probes: Tensor,
    scores: Tensor,
    good: list[int],
    seed: int,
) -> dict[int, dict[str, float]]:
    from sklearn.linear_model import LogisticRegression

    ranking, _ = fit_multi_probe(codes[0], train_letters, len(LETTERS), l1=0.01, seed=seed)
    found = {}
    for letter in good:
        ranked = ranking[letter].topk(min(_MAX_K, ranking.shape[1])).indices
        is_letter = (train_letters == letter).numpy()
        f1s: list[float] = []
        for k in range(1, len(ranked) + 1):
            train, test = (part[:, ranked[:k]].cpu().numpy() for part in codes)
            probe = LogisticRegression(max_iter=500, class_weight="balanced").fit(train, is_letter)
            f1s.append(_f1(torch.from_numpy(probe.decision_function(test) > 0), test_letters == letter))
            if len(main_features(f1s, range(len(f1s)))) < k:
                break
        main = main_features(f1s, ranked.tolist())
        right = ((test_letters == letter) & (scores[:, letter] > 0).cpu()).nonzero()[:, 0].tolist()
        words = [word_absorption(test_x[row], codes[1][row], directions, probes[letter], main) for row in right]
        found[letter] = {
            "mean_absorption_fraction": float(np.mean([fraction for fraction, _ in words])),
            "full_absorption_rate": float(np.mean([full for _, full in words])),
            "num_probe_true_positives": len(words),
            "num_split_features": len(main),
            "k1_f1": f1s[0],
        }
    return found


def _figures(letters: dict[int, dict[str, float]]) -> dict[str, Metric]:
    what = {
        "mean_absorption_fraction_score": (
            "mean_absorption_fraction", "share of a word's letter that absorbing features carry, over words and letters"
        ),
        "mean_full_absorption_score": (
            "full_absorption_rate", "share of words whose letter another feature carries while the main ones are silent"
        ),
        "mean_num_split_features": ("num_split_features", "features that a letter is split over"),
        "mean_k1_f1": ("k1_f1", "F1 of the best single feature for its letter; low: little is there to be absorbed"),
    }  # fmt: skip
    return {
        name: mean_metric(name, [each[key] for each in letters.values()], definition)
        for name, (key, definition) in what.items()
    }


def _f1(predicted: Bool[Tensor, "words"], true: Bool[Tensor, "words"]) -> float:
    predicted = predicted.cpu()
    hits = int((predicted & true).sum())
    return 2 * hits / max(int(predicted.sum()) + int(true.sum()), 1)
