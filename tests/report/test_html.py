"""The report as a reader meets it: in a browser, from the disk, with whatever text a corpus holds."""

import re

import numpy as np
import pytest

from apportion.errors import InputError
from apportion.report import ExplainedFeature, ReportData, ScorerFigures, write_report
from made_up_report import made_up_contexts, made_up_report

pytestmark = pytest.mark.browser

WORDS = [" the", " cat", " sat", "\n", "    ", "ing", " Unicorn", " été", "(x)", " mat", " on", "."]


def wait_until(page, condition: str) -> None:
    """Wait for a JavaScript expression to be true; playwright's own wait needs eval, which the policy forbids."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"never came true: {condition}")


def shown_features(page) -> list[int]:
    """Features in the list, from top to bottom, as far as they are drawn."""
    return page.eval_on_selector_all(
        "#spacer a.row",
        "rows => rows.sort((a, b) => parseFloat(a.style.top) - parseFloat(b.style.top)).map(a => +a.dataset.feature)",
    )


def test_summary_shows_facts_metrics_and_plots(open_report):
    page = open_report(made_up_report(60, WORDS))
    assert page.inner_text("h1") == "A made-up dictionary"
    assert "0.1234" in page.inner_text(".metrics")
    assert "± 0.0021" in page.inner_text(".metrics")
    titles = page.locator("figcaption strong").all_inner_texts()
    assert titles == [
        "Feature density by rank",
        "Active features per token",
        "Error by token difficulty",
        "Budget by token difficulty",
        "loss",
        "l0",
    ]
    assert page.locator("svg .law").count() == 1
    assert page.locator("#handful a.row").count() == 8


def test_sorting_by_a_column_and_again_in_the_other_direction(open_report):
    data = made_up_report(60, WORDS)
    page = open_report(data, "#/features")
    assert shown_features(page)[:3] == [0, 1, 2]
    page.click('[data-sort="max"]')
    by_max = np.argsort(-data.contexts.max_activation, kind="stable")
    assert shown_features(page)[:5] == by_max[:5].tolist()
    page.click('[data-sort="max"]')
    assert shown_features(page)[:5] == by_max[::-1][:5].tolist()
    assert page.locator('[aria-sort="ascending"]').inner_text().startswith("Max")


def test_search_finds_labels_promoted_tokens_and_contexts(open_report):
    contexts = made_up_contexts(40, 5)
    contexts.token_ids[7, 2, 3] = 6  # the one place where " Unicorn" is part of a context …
    contexts.token_ids[7, 2, 4] = 2
    contexts.position[7, 2] = 10_000  # … a place that no other window shows
    data = made_up_report(40, WORDS, contexts=contexts, labels={11: "Horned unicorns", 12: "Cats"})
    data.lens.promoted_ids[:] = 9
    data.lens.promoted_ids[23, 4] = 6
    page = open_report(data, "#/features")

    page.fill("#search", "uniCORN")
    wait_until(page, "document.querySelector('#found').textContent.startsWith('3 of')")
    assert shown_features(page) == [7, 11, 23]
    assert page.locator("#spacer mark").all_inner_texts() == [" Unicorn"]

    page.get_by_role("button", name="Contexts").click()
    assert shown_features(page) == [7]
    page.fill("#search", "unicorn sat")
    wait_until(page, "document.querySelectorAll('#spacer mark').length === 2")
    page.fill("#search", "#23")
    wait_until(page, "document.querySelector('#found').textContent.startsWith('0 of')")
    page.get_by_role("button", name="Everything").click()
    assert shown_features(page) == [23]
    page.fill("#search", "no such thing at all")
    page.wait_for_selector(".nothing")


def test_a_phrase_is_not_found_across_stretches_of_text_that_are_not_neighbours(open_report):
    contexts = made_up_contexts(12, 1)
    contexts.token_ids[3, 0, -1] = 1
    contexts.position[3, 0] = 10_000
    contexts.token_ids[4, 0, 0] = 2
    contexts.position[4, 0] = 20_000
    page = open_report(made_up_report(12, WORDS, contexts=contexts, lens=None), "#/features?q=cat+sat")
    assert shown_features(page) == []


def test_open_a_feature_and_come_back_to_the_same_place(open_report):
    page = open_report(made_up_report(400, WORDS), "#/features?sort=-max")
    page.evaluate("document.querySelector('#scroller').scrollTop = 5000")
    wait_until(page, "[...document.querySelectorAll('#spacer a.row')].some(a => parseFloat(a.style.top) > 5500)")
    feature = page.evaluate(
        "+[...document.querySelectorAll('#spacer a.row')].find(a => parseFloat(a.style.top) > 5200).dataset.feature"
    )
    page.click(f'#spacer [data-feature="{feature}"]')
    page.wait_for_selector("#view-feature .title")
    assert page.inner_text(".title h1") == f"Feature {feature}"
    page.go_back()
    page.wait_for_selector("#view-features:not([hidden])")
    assert page.evaluate("document.querySelector('#scroller').scrollTop") == 5000
    assert page.locator("[aria-sort=descending]").inner_text().startswith("Max")


def test_feature_page_shows_contexts_shaded_in_proportion(open_report):
    data = made_up_report(200, WORDS)
    page = open_report(data, "#/feature/150")
    page.wait_for_selector(".context")
    assert page.locator(".group h3").all_inner_texts() == [
        "Strongest contexts",
        "50–100 % of the maximum",
        "0–50 % of the maximum",
    ]
    first = data.contexts.activations[150, 0]
    shares = page.eval_on_selector(
        ".context", "c => [...c.querySelectorAll('.tok')].map(t => +t.style.getPropertyValue('--share'))"
    )
    np.testing.assert_allclose(shares, first / data.contexts.max_activation[150], atol=1e-4)
    words = page.eval_on_selector(".context", "c => [...c.querySelectorAll('.tok')].map(t => t.textContent)")
    expected = [WORDS[token].replace("\n", "↵").replace("    ", "····") for token in data.contexts.token_ids[150, 0]]
    assert words == expected
    page.locator(".context .tok.peak").first.hover()
    assert "100 % of the maximum" in page.inner_text("#tip")
    assert page.locator(".lens li").count() == 20
    assert page.locator(".near a").first.get_attribute("href") == "#/feature/151"
    page.locator(".near a").first.click()
    wait_until(page, "document.querySelector('.title h1').textContent === 'Feature 151'")


def test_a_feature_that_never_fired_says_so(open_report):
    page = open_report(made_up_report(30, WORDS), "#/feature/29")
    page.wait_for_selector("text=never fired on the text")


def test_a_number_beyond_the_dictionary_is_explained(open_report):
    page = open_report(made_up_report(30, WORDS), "#/feature/30")
    page.wait_for_selector("text=features 0 to 29")


def test_keys_walk_through_the_list_and_the_features(open_report):
    page = open_report(made_up_report(60, WORDS), "#/features")
    page.keyboard.press("/")
    page.keyboard.type("#5")
    wait_until(page, "document.querySelectorAll('#spacer a.row').length === 1")
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    wait_until(page, "document.querySelectorAll('#spacer a.row').length > 20")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    wait_until(page, "document.querySelector('.title h1')?.textContent === 'Feature 1'")
    page.keyboard.press("ArrowRight")
    wait_until(page, "document.querySelector('.title h1').textContent === 'Feature 2'")
    page.keyboard.press("ArrowLeft")
    wait_until(page, "document.querySelector('.title h1').textContent === 'Feature 1'")
    page.keyboard.press("w")
    page.wait_for_selector(".wrapped")
    page.keyboard.press("Escape")
    page.wait_for_selector("#view-features:not([hidden])")
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")


HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    "<!--<script>",
    "]]>",
    "</style><style>*{display:none}</style>",
    "{{7*7}}{% raw %}",
    "\ud800",
    "\udc00\ud800",
    "\ud83d\ude00",
    "\u202eevil\u202c",
    "\u200b",
    "\u200d",
    "\ufeff",
    "\x00",
    "\x1b[31m",
    "\u2028",
    "\u0645\u0631\u062d\u0628\u0627",
    "Z\u0351\u036b\u0343\u036a",
    "👩\u200d👩\u200d👧",
    "\\u0041\\",
    "'\"`${alert(4)}",
    "&lt;b&gt;&amp;",
    "",
    "javascript:alert(5)",
    "x" * 5000,
]


def test_hostile_and_odd_text_runs_nothing_and_breaks_nothing(open_report):
    attack = "</title><script>alert(9)</script>\ud800"
    data = made_up_report(
        40,
        HOSTILE,
        title=attack,
        summary={attack: attack},
        labels={3: attack},
        document_names=dict.fromkeys(range(100), attack),
        history=[{"step": step, attack: float(step)} for step in range(5)],
    )
    page = open_report(data)
    assert page.inner_text("h1").startswith("</title><script>alert(9)</script>")
    assert page.locator("img, iframe, object, a[href^=javascript]").count() == 0
    scripts = page.evaluate("document.querySelectorAll('script:not([type])').length")
    assert scripts == 1, "only the report's own script"
    for feature in range(0, 39, 6):
        page.goto(page.url.split("#")[0] + f"#/feature/{feature}")
        wait_until(page, f"document.querySelector('.title h1')?.textContent === 'Feature {feature}'")
        page.locator(".context .tok.peak").first.hover()
    page.goto(page.url.split("#")[0] + "#/features")
    for query in ("<script>alert(1)", "onerror", "مرح", "\u202e", "😀", "(?"):
        page.fill("#search", query)
        page.wait_for_timeout(200)
    page.fill("#search", "<script>alert(1)")
    page.wait_for_selector("#spacer a.row")
    shown = page.evaluate("[...document.querySelectorAll('.tok')].map(t => t.textContent)")
    assert "<script>alert(1)</script>" in shown
    assert not any("\u202e" in text or "\u200b" in text for text in shown), (
        "characters that hide or turn text are spelled"
    )


def test_the_policy_would_stop_a_script_that_got_in(open_report):
    page = open_report(made_up_report(20, WORDS))
    refused = page.evaluate("(() => { try { document.body.innerHTML = '<b>'; return false } catch { return true } })()")
    assert refused
    assert any("TrustedHTML" in trouble for trouble in open_report.troubles)
    open_report.troubles.clear()
    policy = page.get_attribute("meta[http-equiv]", "content")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy.replace("https", "http:")


def test_twenty_thousand_features_keep_the_page_small(open_report):
    n_features = 20_000
    page = open_report(made_up_report(n_features, WORDS), "#/features")
    count = "document.querySelectorAll('#view-features *').length"
    assert page.evaluate("document.querySelector('#spacer').offsetHeight") == n_features * 32
    assert page.evaluate(count) < 3000
    for place in (0.5, 0.9, 1.0):
        page.evaluate(f"document.querySelector('#scroller').scrollTop = {place} * {n_features} * 32")
        wait_until(
            page,
            "[...document.querySelectorAll('#spacer a.row')]"
            ".some(a => Math.abs(parseFloat(a.style.top) - document.querySelector('#scroller').scrollTop) < 64)",
        )
        assert page.evaluate(count) < 3000
    assert shown_features(page)[-1] == n_features - 1
    page.fill("#search", "cat sat")
    wait_until(page, "!document.querySelector('#found').textContent.startsWith('20,000')")
    assert page.evaluate(count) < 3000


def test_sections_without_data_are_left_out(open_report):
    data = ReportData(title="Bare", contexts=made_up_contexts(20, 3))
    page = open_report(data)
    assert page.locator(".metrics").count() == 0
    assert page.locator(".facts").count() == 0
    page.goto(page.url.split("#")[0] + "#/feature/4")
    page.wait_for_selector(".context")
    assert page.locator(".lens, .near").count() == 0
    assert "⟨token " in page.inner_text(".context >> nth=0")


def test_a_file_that_was_cut_off_says_so_and_shows_what_is_there(open_report, tmp_path):
    page = open_report(made_up_report(300, WORDS))
    path = tmp_path / "report.html"
    text = path.read_text()
    path.write_text(text[: text.index('id="block-features-2"') + 200])
    page.goto(path.as_uri() + "#/feature/4")
    page.reload()
    page.wait_for_selector(".context")
    page.goto(path.as_uri() + "#/feature/290")
    page.wait_for_selector("#notice:not([hidden])")
    assert "“features-2” is missing or damaged" in page.inner_text("#notice")


# Body text, secondary text and a fully shaded token against what lies under them, by the formula of WCAG 2.
CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const linear = (v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const luminance = (colours) => {
    for (const colour of colours) {
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
    }
    const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
    return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  };
  const ratio = (ground, ink) => {
    const [light, dark] = [luminance(ground), luminance([...ground, ink])].sort((x, y) => y - x);
    return (light + 0.05) / (dark + 0.05);
  };
  const style = (selector) => getComputedStyle(document.querySelector(selector));
  const paper = style("body").backgroundColor;
  const hot = style(".context .tok.peak");
  return [
    ratio([paper], style("body").color),
    ratio([paper], style(".statistics dt").color),
    ratio([paper, hot.backgroundColor], hot.color),
  ];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground_in_both_schemes(open_report, scheme):
    page = open_report(made_up_report(60, WORDS), "#/feature/3")
    page.emulate_media(color_scheme=scheme)
    page.wait_for_selector(".context")
    contrast = page.evaluate(CONTRAST)
    assert min(contrast) > 4.5, contrast


def test_the_same_data_give_the_same_bytes(tmp_path):
    first = write_report(tmp_path / "a.html", made_up_report(150, WORDS)).read_bytes()
    assert write_report(tmp_path / "b.html", made_up_report(150, WORDS)).read_bytes() == first


def test_nothing_is_loaded_from_anywhere(tmp_path):
    text = write_report(tmp_path / "a.html", made_up_report(20, WORDS)).read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "the name of the SVG language is not fetched"


def test_an_unwritable_place_is_one_clear_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_report(tmp_path / "file" / "report.html", made_up_report(5, WORDS))


def explained(text, auroc=0.8, **changes):
    figures = {
        "auroc": auroc,
        "balanced_accuracy": 0.75,
        "expected_precision": 0.02,
        "by_quantile": [0.1, 0.5, None, 1.0],
        "by_source": {"random": 0.9, "neighbour": 0.7},
    }
    other = ScorerFigures(failed={"nonsense": 5}, notes={"nats": 0.42, "explanation": "words about <b>cats</b>"})
    scores = {"detection": ScorerFigures(**(figures | changes)), "intervention": other}
    return ExplainedFeature(text, "default", "local:somebody", flagged=True, scores=scores)


def test_explanations_are_labels_and_their_scores_sort_the_list(open_report):
    explanations = {
        3: explained("Names of cats", 0.6),
        5: explained("Closing brackets", 0.9),
        7: explained("Mats", None),
    }
    page = open_report(made_up_report(40, WORDS, explanations=explanations), "#/features")
    page.click('[data-sort="score"]')
    assert shown_features(page)[:2] == [5, 3]
    assert page.locator("#spacer .rated").all_inner_texts()[:3].count("–") <= 1
    page.fill("#search", "closing")
    wait_until(page, "document.querySelector('#found').textContent.startsWith('1 of')")
    assert shown_features(page) == [5]


def test_feature_page_shows_the_explanation_and_how_well_it_holds(open_report):
    page = open_report(made_up_report(40, WORDS, explanations={3: explained("<i>Names</i> of cats")}), "#/feature/3")
    page.wait_for_selector(".explained")
    said = page.inner_text(".explained")
    assert page.inner_text(".title .name") == "<i>Names</i> of cats"
    assert "default · local:somebody" in said
    assert "0.80" in said
    assert "random 0.90, neighbour 0.70" in said
    assert "no answer: 5 nonsense" in said
    assert "words about <b>cats</b>" in said
    assert "did not keep to the form" in said
    assert page.locator(".explained .quantiles rect").count() == 4


def test_a_report_without_explanations_has_no_column_for_them(open_report):
    page = open_report(made_up_report(40, WORDS), "#/features")
    assert page.locator('[data-sort="score"]').count() == 0
    assert page.locator(".rated").count() == 0
