import sys
import types

import pytest

PROMPT = ("--prompt", "An assignment statement evaluates the expression list and", "--tokens", "6")


def test_generate_shows_the_text_its_cost_and_where_it_differs(tiny_llama, typed):
    out = typed("generate", tiny_llama, *PROMPT, "--method", "snap_kv", "--budget", "1/4").out

    assert "cache held" in out
    assert "snap_kv" in out
    assert "dense" in out
    assert "token" in out.splitlines()[-1] or "token" in out


def test_generate_with_everything_writes_what_dense_attention_does(tiny_llama, typed):
    answer = typed("generate", tiny_llama, *PROMPT, "--method", "oracle", "--budget", "1.0", "--json").json

    (text,) = answer["texts"]
    assert text["first_difference"] is None
    assert text["method"]["text"] == text["dense"]["text"]
    assert text["method"]["bytes_held"] == text["dense"]["bytes_held"] > 0
    assert text["method"]["keys_read"] == 1
    assert text["method"]["tokens_per_second"] > 0
    assert answer["method"]["name"] == "oracle"


def test_generate_says_where_a_method_that_reads_little_differs(tiny_llama, typed, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT[1])
    more = ("--prompt", f"@{file}", "--tokens", "20", "--method", "streaming_llm", "--keys", "5", "--json")
    answer = typed("generate", tiny_llama, *more).json

    (text,) = answer["texts"]
    place = text["first_difference"]["token"]
    assert text["prompt"] == PROMPT[1]
    assert 0 < place < 20
    assert text["first_difference"]["method"] != text["first_difference"]["dense"]
    assert text["method"]["bytes_held"] < text["dense"]["bytes_held"] / 4
    assert text["method"]["bytes_per_step"] < text["dense"]["bytes_per_step"] / 2


def test_generate_lists_methods_and_keeps_them(tiny_llama, typed, tmp_path):
    listed = typed("generate", tiny_llama, "--method", "list", "--json").json
    assert {"dense", "snap_kv", "quantized_4"} <= {each["name"] for each in listed["methods"]}
    assert "snap_kv" in typed("generate", tiny_llama, "--method", "list").out
    outcome = typed("generate", tiny_llama, "--method", "dense")
    assert outcome.code == 2
    assert "--prompt" in outcome.errors[0]

    folder = tmp_path / "method"
    first = typed("generate", tiny_llama, *PROMPT, "--method", "knorm", "--keys", "9", "--save", folder, "--json").json
    again = typed("generate", tiny_llama, *PROMPT, "--saved", folder, "--json").json
    assert again["texts"][0]["method"]["text"] == first["texts"][0]["method"]["text"]
    assert again["method"]["settings"] == first["method"]["settings"]
    other = typed("generate", tiny_llama, *PROMPT, "--saved", folder, "--budget", "1/2", "--json").json
    assert other["method"]["settings"]["budget"]["share"] == 0.5


def test_a_method_that_has_to_be_fitted_is(tiny_llama, typed, tmp_path, monkeypatch):
    import key_methods
    from apportion.keys.catalogue import CATALOGUE, Offered

    monkeypatch.setitem(CATALOGUE, "needs_fit", Offered(key_methods.NeedsFit, "reads", ""))
    text = tmp_path / "text.txt"
    text.write_text("Some words to fit a method to.")
    given = ("generate", tiny_llama, *PROMPT, "--method", "needs_fit", "--keys", "4")

    unfitted = typed(*given)
    assert unfitted.code == 2
    assert "--fit" in unfitted.errors[0]
    fitted = typed(*given, "--fit", text, "--json")
    assert fitted.code == 0, fitted.err
    assert "fitting needs_fit to 1 texts" in fitted.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--method", "snapkv"), ("--method", "'snapkv'", "snap_kv")),
        (("--method", "oracle", "--budget", "many"), ("--budget", "'many'", "1/16")),
        (("--budget", "1/4", "--keys", "9"), ("--budget 1/4 and --keys 9",)),
        (("--saved", "nowhere"), ("--saved", "nowhere")),
        (("--saved", "nowhere", "--method", "oracle"), ("--saved nowhere and --method oracle",)),
        (("--prompt", "@nowhere.txt"), ("--prompt @nowhere.txt",)),
        (("--prompt", ""), ("--prompt", "empty")),
        (("--tokens", "999"), ("256 positions",)),
        (("--method", "kvpress:KnormPress"), ("--method", "kvpress is not installed")),
        (("--chat",), ("--prompt", "chat template")),
    ],
)
def test_what_cannot_be_written_is_refused(arguments, named, tiny_llama, typed):
    outcome = typed("generate", tiny_llama, *PROMPT, *arguments)

    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert len(outcome.errors) == 1
    assert all(part in outcome.errors[0] for part in named), outcome.errors


def test_a_press_of_kvpress_can_be_named(tiny_llama, typed, monkeypatch):
    from key_methods import ShortKeys

    library = types.ModuleType("kvpress")
    library.KnormPress = ShortKeys
    monkeypatch.setitem(sys.modules, "kvpress", library)
    press = typed("generate", tiny_llama, *PROMPT, "--method", "kvpress:KnormPress", "--budget", "1/3", "--json").json
    ours = typed("generate", tiny_llama, *PROMPT, "--method", "knorm", "--budget", "1/3", "--json").json

    assert press["texts"][0]["method"]["text"] == ours["texts"][0]["method"]["text"]
    assert press["texts"][0]["method"]["bytes_held"] == ours["texts"][0]["method"]["bytes_held"]
