"""``apportion compress``: smaller files, and what they are worth."""

import torch
from torch import nn

from apportion.models import load
from apportion.weights.sparse_linear import SparseLinear

PROMPT = ("--prompt", "An assignment statement evaluates the expression list and", "--tokens", "6")


def _pruned(tiny_llama, folder):
    lm = load(tiny_llama)
    for each in lm.model.model.modules():
        if isinstance(each, nn.Linear):
            each.weight.data *= torch.rand_like(each.weight) < 0.2
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def test_compress_there_generate_and_back(tiny_llama, typed, tmp_path):
    pruned = _pruned(tiny_llama, tmp_path / "pruned")
    out = typed("compress", pruned, "--out", tmp_path / "small")
    assert out.code == 0, out.err
    assert "bitmap" in out.out
    assert "times as much" in out.out
    assert "are zero; values are float32" in out.out
    assert "Dense when it runs: model.embed_tokens.weight: its weight is tied to another" in out.out

    plain = typed("compress", tmp_path / "small", "--out", tmp_path / "plain", "--format", "dense", "--json").json
    assert plain["bytes"] == sum(each.stat().st_size for each in (tmp_path / "plain").glob("*.safetensors"))
    wanted, found = (load(each).model.state_dict() for each in (pruned, tmp_path / "plain"))
    assert all(torch.equal(found[name], each) for name, each in wanted.items())

    texts = {
        typed("generate", folder, *PROMPT, *more, "--json").json["texts"][0]["method"]["text"]
        for folder, more in ((pruned, ()), (tmp_path / "small", ()), (tmp_path / "small", ("--sparse",)))
    }
    assert len(texts) == 1


def test_sparse_stays_sparse(tiny_llama, typed, tmp_path, monkeypatch):
    typed("compress", _pruned(tiny_llama, tmp_path / "pruned"), "--out", tmp_path / "small")
    used = []
    real = SparseLinear.forward
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: used.append(1) or real(self, x))
    typed("generate", tmp_path / "small", *PROMPT)
    assert not used
    typed("generate", tmp_path / "small", *PROMPT, "--sparse")
    assert used


def test_compress_answers_in_json(tiny_llama, typed, tmp_path):
    pruned = _pruned(tiny_llama, tmp_path / "pruned")
    out = tmp_path / "small"
    answer = typed("compress", pruned, "--out", out, "--dtype", "bfloat16", "--format", "bitmap", "--json").json
    assert answer["bytes"] == (out / "packed.safetensors").stat().st_size
    assert answer["ratio"] == answer["dense_bytes"] / answer["bytes"] > 1.5
    formats = answer["by_format"]
    assert formats["bitmap"]["bytes"] < formats["csr"]["bytes"] < formats["dense"]["bytes"]
    assert formats["bitmap"]["chosen"] == 21
    assert sum(each["bytes"] for each in answer["weights"]) < answer["bytes"]
    dense = {each["name"]: each["runs_dense"] for each in answer["weights"] if each["runs_dense"]}
    assert dense == {"model.embed_tokens.weight": "its weight is tied to another module's"}


def test_a_dense_model_gains_nothing_and_is_told_so(tiny_llama, typed, tmp_path):
    assert "prune the model first" in typed("compress", tiny_llama, "--out", tmp_path / "small").out


def test_bad_input_of_compress(tiny_llama, typed, tmp_path):
    for arguments, message in (
        ((tiny_llama, "--out", tmp_path, "--format", "coo"), "--format coo"),
        ((tiny_llama, "--out", tmp_path, "--dtype", "int8"), "--dtype int8"),
        ((tiny_llama, "--out", tiny_llama), "MODEL itself"),
        ((tmp_path / "nowhere", "--out", tmp_path / "small"), "MODEL"),
    ):
        found = typed("compress", *arguments)
        assert found.code == 2
        assert message in found.err
    (tmp_path / "file").write_text("")
    assert typed("compress", tiny_llama, "--out", tmp_path / "file" / "below").code == 2
    found = typed("generate", tiny_llama, *PROMPT, "--sparse")
    assert found.code == 2
    assert "no folder of packed weights" in found.err
