"""The prompt explorer as a reader meets it: a file, or a page that asks, and a feature followed to its sources."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.allocate import TokenChoice
from apportion.errors import InputError
from apportion.features import SparseAutoencoder
from apportion.models import LanguageModel, Site, capture, load
from apportion.report import write_report
from apportion.report.explorer import Explorer, write_explorer
from apportion.report.payload import decode_block
from apportion.report.server import ExplorerServer, explorer_server
from made_up_report import made_up_report

HEADS, STREAM = Site(2, "heads"), Site(1, "residual")
PROMPT = "a <script>alert(1)</script>"


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load(str(tiny_llama))


def explorer_of(lm: LanguageModel, *sites: Site) -> Explorer:
    ids = torch.tensor(lm.tokenizer("The assignment of a target list to a single target")["input_ids"])
    dictionaries = {}
    for site in sites:
        sae = SparseAutoencoder(32, 48, TokenChoice(5), seed=0)
        sae.initialise_from(capture(lm, [site], ids[None])[site][0])
        dictionaries[site] = sae.eval()
    return Explorer(lm, sites[0], dictionaries, "A tiny model", features_per_token=2)


def nodes_of(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield content
    for part in content.get("parts", []):
        yield from nodes_of(part)


def test_every_number_on_a_page_adds_up(lm: LanguageModel) -> None:
    content = explorer_of(lm, HEADS, STREAM).explore(PROMPT)
    assert "".join(content["tokens"]) == PROMPT
    assert [each["firing"] for each in content["features"]] == [5] * len(content["tokens"])
    kinds = set()
    for token in content["features"]:
        assert len(token["shown"]) == 2
        for root in token["shown"]:
            assert root["value"] == root["activation"]
            assert sum(root["shares"]) == pytest.approx(1, abs=1e-4)
            assert 0 < root["control"]["random"] <= 1
            for node in nodes_of(root):
                kinds.add(node["kind"])
                if "parts" in node:
                    sizes = sum(abs(part["value"]) for part in node["parts"])
                    assert sum(part["value"] for part in node["parts"]) == pytest.approx(
                        node["value"], abs=1e-5 * sizes
                    )
    assert {"feature", "source", "error", "dictionary bias", "model bias", "embedding", "mlp", "attention"} <= kinds


def test_following_goes_where_a_page_does_and_beyond(lm: LanguageModel) -> None:
    explorer = explorer_of(lm, HEADS)
    root = explorer.explore("a target list")["features"][-1]["shown"][0]
    source = next(part for part in root["parts"] if "parts" in part)
    deeper = next(part for part in source["parts"] if part["kind"] == "attention")
    position = len(explorer.explore("a target list")["tokens"]) - 1
    found = explorer.follow("a target list", root["feature"], position, [source["place"], deeper["place"]])
    assert found["value"] == pytest.approx(deeper["value"])
    assert {part["kind"] for part in found["parts"]} == {"source"}
    with pytest.raises(InputError, match="there is no part 999"):
        explorer.follow("a target list", root["feature"], position, [999])
    with pytest.raises(InputError, match="has 0 tokens"):
        explorer.explore("")
    with pytest.raises(InputError, match="give one of 1 to 128"):
        explorer.explore("target " * 200)


def test_dictionaries_that_cannot_be_followed_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="an MLP's output is no linear function"):
        explorer_of(lm, Site(1, "mlp_out"))


@pytest.fixture
def page(browser: object) -> Iterator[Any]:
    """A page that tells on every error, dialog and request to elsewhere."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    troubles: list[str] = []
    opened = context.new_page()
    opened.on("console", lambda said: troubles.append(said.text) if said.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
    opened.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("file:", "http://127.0.0.1:")) and "report.html" not in request.url
            else troubles.append(request.url)
        ),
    )
    yield opened
    context.close()
    assert not troubles, troubles


def written(page: Any) -> str:
    """The prompt as the page shows it, token by token; a token that is a space is a dot."""
    return "".join(page.locator("#text button").all_text_contents()).replace("·", " ")


def values(page: Any, selector: str) -> list[float]:
    return [float(text.replace("−", "-").replace(",", "")) for text in page.locator(selector).all_inner_texts()]


@pytest.mark.browser
def test_a_feature_is_followed_from_heads_to_sources_to_features_upstream(
    lm: LanguageModel, page: Any, tmp_path: Path
) -> None:
    path = write_explorer(tmp_path / "explore.html", explorer_of(lm, HEADS, STREAM), [PROMPT, "a target list"])
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.locator("#prompts button").count() == 2
    assert written(page) == PROMPT
    assert page.locator("#features button").count() == 2
    assert page.locator(".ways h3").all_text_contents()[0].startswith("By head")
    assert page.locator(".grid tbody tr").count() == 4
    by_head = values(page, ".ways section:nth-child(1) .part .number")
    by_source = values(page, ".ways section:nth-child(2) .part .number")
    assert len(by_head) == 4
    value = float(page.inner_text(".equation b").replace("−", "-"))
    assert sum(by_source) == pytest.approx(value, abs=0.02)
    assert "Localisation comes from the attention pattern, not from the dictionary" in page.inner_text(".aside-note")

    page.locator(".ways section:nth-child(2) button.part").first.click()
    page.wait_for_selector(".ways.one")
    assert page.locator(".crumbs li").count() == 2
    names = page.locator(".part .name").all_inner_texts()
    assert any("of layers.1.residual" in name for name in names)
    assert any(name.startswith("error of the dictionary") for name in names)
    assert any(name.startswith("biases of the model") for name in names)
    page.locator("button.part", has_text="of layers.1.residual").first.click()
    page.wait_for_selector(".crumbs li:nth-child(3)")
    assert any(name.startswith("embedding of") for name in page.locator(".part .name").all_inner_texts())
    page.go_back()
    page.keyboard.press("Escape")
    page.wait_for_selector(".grid")
    page.keyboard.press("ArrowLeft")
    page.locator("#prompts button").nth(1).click()
    assert written(page) == "a target list"


@pytest.mark.browser
def test_what_a_person_types_is_explored_and_followed_as_far_as_they_like(lm: LanguageModel, page: Any) -> None:
    with serving(explorer_of(lm, HEADS)) as server:
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector("html[data-ready]", state="attached")
        page.fill("#prompt", "a <b>new</b> list")
        page.click("#ask button")
        page.wait_for_selector("#prompts button:nth-child(2)")
        assert written(page) == "a <b>new</b> list"
        # The smallest source was not followed beforehand, nor was what lies below it.
        page.locator(".ways section:nth-child(2) button.part").last.click()
        page.wait_for_selector(".ways.one .part")
        page.locator("button.part", has_text="heads of layer").last.click()
        page.wait_for_selector(".crumbs li:nth-child(3)")
        page.wait_for_selector(".grid")


class serving:
    """A server that runs meanwhile."""

    def __init__(self, explorer: Explorer, **more: Any) -> None:
        self.server = explorer_server(explorer, ["a list"], port=0, **more)

    def __enter__(self) -> ExplorerServer:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self.server

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def ask(server: ExplorerServer, where: str, content: object = None, **headers: str) -> tuple[int, bytes]:
    data = None if content is None else json.dumps(content).encode()
    headers = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{where}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_the_server_answers_its_own_page_and_nobody_else(lm: LanguageModel, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text("the report")
    with serving(explorer_of(lm, HEADS), report=report) as server:
        assert server.server_address[0] == "127.0.0.1"
        code, found = ask(server, "/")
        assert code == 200
        assert b"connect-src &#39;self&#39;" in found
        assert ask(server, "/report.html") == (200, b"the report")
        assert ask(server, "/etc/passwd")[0] == 404
        code, found = ask(server, "/explore", {"prompt": "to a list"})
        assert code == 200
        assert "".join(json.loads(found)["tokens"]) == "to a list"
        assert ask(server, "/", Host="evil.example")[0] == 403
        assert ask(server, "/explore", {"prompt": "a"}, Host="evil.example")[0] == 403
        assert ask(server, "/explore", {"prompt": "a"}, Content_Type="text/plain")[0] == 400
        for question in ({"prompt": ""}, {"prompt": 3}, {}, [1]):
            code, found = ask(server, "/explore", question)
            assert code == 400
            assert json.loads(found)["error"]
        code, found = ask(server, "/follow", {"prompt": "to", "feature": 999, "position": 0, "path": []})
        assert code == 400
        assert "features 0 to 47" in json.loads(found)["error"]
        with pytest.raises(InputError, match=r"port \d+ cannot be used"):
            explorer_server(server.explorer, ["a list"], port=server.server_port)


def test_a_file_may_ask_nobody_and_keeps_text_in_blocks(lm: LanguageModel, tmp_path: Path) -> None:
    path = write_explorer(tmp_path / "explore.html", explorer_of(lm, HEADS), [PROMPT])
    text = path.read_text(encoding="utf-8")
    assert "connect-src" not in text
    assert "alert(1)" not in text
    block = text.split('id="block-prompt-0">')[1].split("<")[0]
    assert decode_block(block)[1]["prompt"] == PROMPT
    assert 'href="report.html' not in text
    # Beside a report each links to the other.
    write_report(tmp_path / "report.html", made_up_report(5, [" a", " b"]))
    assert 'href="explore.html"' in (tmp_path / "report.html").read_text(encoding="utf-8")
    write_explorer(path, explorer_of(lm, HEADS), ["a list"])
    assert 'href="report.html#/features"' in path.read_text(encoding="utf-8")
    with pytest.raises(InputError, match="prompts is empty"):
        write_explorer(path, explorer_of(lm, HEADS), [])
