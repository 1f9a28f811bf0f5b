"""The page of two dictionaries shows pairs and loners, and text from a corpus stays text."""

from pathlib import Path

import numpy as np
import pytest
import torch

from apportion.features.contexts import FeatureContexts
from apportion.features.similarity import best_matches, one_to_one
from apportion.report.comparison import Comparison, Side, comparison_figures, texts_of, write_comparison

EVIL = "<script>alert(1)</script>"


def contexts(n: int) -> FeatureContexts:
    """Every feature fires once, on the second of three tokens; the last feature never."""
    peak = np.ones((n, 1), dtype=np.int32)
    peak[-1] = -1
    fires = np.full(n, 5)
    fires[-1] = 0
    activations = np.zeros((n, 1, 3), dtype=np.float32)
    activations[:, 0, 1] = 2.0
    zeros = np.zeros((n, 1), dtype=np.int32)
    return FeatureContexts(
        n_tokens=100,
        top=1,
        quantiles=0,
        per_quantile=0,
        fires=fires,
        activation_sum=np.ones(n),
        max_activation=np.full(n, 2.0, dtype=np.float32),
        histogram=np.zeros((n, 2), dtype=np.int64),
        histogram_edges=np.ones(3),
        winners_per_token=np.ones(4, dtype=np.int64),
        token_ids=np.tile(np.array([[[0, 1, -1]]], dtype=np.int32), (n, 1, 1)),
        activations=activations,
        peak=peak,
        position=zeros,
        document=zeros,
    )


@pytest.fixture
def data() -> Comparison:
    a = torch.eye(6)[:4]
    b = torch.cat([a[:2], torch.eye(6)[4:]])
    shown = contexts(4)
    return Comparison(
        title=f"one {EVIL}",
        a=Side("first", {"features": 4, "text": EVIL}, shown, best_matches(a, b), {0: EVIL}),
        b=Side("second", {"features": 4, "fvu": 0.25}, shown, best_matches(b, a)),
        matching=one_to_one(a, b),
        token_text=texts_of([shown], lambda ids: [EVIL, "line\nof \u202etext"][: len(ids)]),
        notes=["a note"],
    )


def test_the_page_shows_pairs_and_who_is_alone(data: Comparison, tmp_path: Path) -> None:
    page = write_comparison(tmp_path / "page.html", data).read_text(encoding="utf-8")
    assert "cosine 0.9 and above" in page
    assert page.count('class="pair"') == 2 + 2  # two shared, two assigned without likeness
    assert "Only in first" in page
    assert "2 features without a partner" in page
    assert "a note" in page
    assert '<mark class="s8">line↵of ⟨202E⟩text</mark>' in page
    assert "never fires on this text" in page


def test_text_stays_text_and_nothing_is_loaded(data: Comparison, tmp_path: Path) -> None:
    page = write_comparison(tmp_path / "page.html", data).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "default-src &#39;none&#39;; style-src &#39;sha256-" in page
    assert "http" not in page.replace("http-equiv", "")


def test_figures_count_what_is_shared(data: Comparison) -> None:
    figures = {name: value for name, value, _ in comparison_figures(data)}
    assert figures["shared"] == figures["alone_a"] == figures["alone_b"] == 2
    assert figures["mean_max_cosine_a"] == pytest.approx(0.5)
    assert "mean_correlation" not in figures


@pytest.mark.browser
def test_a_browser_applies_the_style_and_finds_no_fault(data: Comparison, tmp_path: Path) -> None:
    import shutil
    import subprocess

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    page = write_comparison(tmp_path / "page.html", data)
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "Only in second" in done.stdout
    assert "Content Security Policy" not in done.stderr
