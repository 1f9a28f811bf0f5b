import shutil
import threading
import urllib.request

import pytest

from apportion.features import SparseAutoencoder


def test_explore_writes_a_page_with_the_prompts_asked_for(finished, typed, tmp_path):
    answer = typed("explore", finished, "--prompt", "if x is a list", "--out", tmp_path / "page.html", "--json").json

    assert answer["page"] == str(tmp_path / "page.html")
    assert answer["bytes"] == (tmp_path / "page.html").stat().st_size
    assert answer["site"] == "layers.1.residual"
    assert answer["prompts"][0] == "if x is a list"
    assert len(answer["prompts"]) > 1


@pytest.fixture
def of_another_site(finished, tmp_path):
    """The same dictionary, said to be of another site."""

    def made(site):
        sae = SparseAutoencoder.load(finished / "dictionary")
        sae.metadata["source"] = {**sae.metadata["source"], "site": site}
        sae.save(tmp_path / site)
        return tmp_path / site

    return made


def test_explore_refuses_what_it_cannot_follow(finished, of_another_site, typed, tmp_path):
    outcome = typed("explore", of_another_site("layers.1.mlp_out"))
    assert outcome.code == 2
    assert "an MLP's output is no linear function" in outcome.errors[0]

    outcome = typed("explore", finished, "--upstream", finished)
    assert outcome.code == 2
    assert "--upstream: there are two dictionaries for layers.1.residual" in outcome.errors[0]

    outcome = typed("explore", finished, "--prompt", "")
    assert outcome.code == 2
    assert "--prompt: prompt '' has 0 tokens" in outcome.errors[0]

    outcome = typed("explore", finished, "--serve", "--json")
    assert outcome.code == 2
    assert "--serve shows a page and writes none" in outcome.errors[0]

    outcome = typed("explore", tmp_path / "nothing")
    assert outcome.code == 2
    assert "RUN: " in outcome.errors[0]


def test_a_dictionary_without_its_source_is_refused(finished, typed, tmp_path):
    shutil.copytree(finished / "dictionary", tmp_path / "alone")
    sae = SparseAutoencoder.load(tmp_path / "alone")
    sae.metadata = {}
    sae.save(tmp_path / "alone")

    outcome = typed("explore", tmp_path / "alone")

    assert outcome.code == 2
    assert "does not say which activations it was trained on" in outcome.errors[0]


def test_explore_serves_until_it_is_interrupted(finished, of_another_site, typed, monkeypatch):
    from apportion.report import server

    seen = {}

    def once(self):
        # One request, then Ctrl-C.
        def ask():
            with urllib.request.urlopen(f"http://127.0.0.1:{self.server_port}/", timeout=60) as answer:
                seen["page"] = answer.read().decode()

        asking = threading.Thread(target=ask)
        asking.start()
        self.handle_request()
        asking.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(server.ExplorerServer, "serve_forever", once)

    upstream = of_another_site("layers.0.residual")
    outcome = typed("explore", finished, "--upstream", upstream, "--serve", "--port", "0", "--prompt", "a list")

    assert outcome.code == 130
    assert "http://127.0.0.1:" in outcome.err
    assert 'id="ask"' in seen["page"]
