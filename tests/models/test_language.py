import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.models import LanguageModel, Site, capture, language, load, splice


@pytest.fixture
def tiny_copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the hub's offline mode, in which it does not try: here it would try, and fail."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def wrap(model: Any) -> LanguageModel:
    return LanguageModel("tiny", model, tokenizer=None)


def bert_folder(bert: Any, tiny_llama: Path, folder: Path) -> Path:
    shutil.copytree(tiny_llama, folder)
    bert.save_pretrained(folder)
    return folder


# --- loading


@pytest.mark.usefixtures("no_network")
def test_a_folder_is_loaded_without_the_network(tiny_llama: Path) -> None:
    lm = load(tiny_llama)
    assert lm.name == str(tiny_llama)
    assert (lm.d_model, lm.n_layers, lm.is_causal) == (32, 3, True)
    assert lm.device == torch.device("cpu")
    assert lm.tokenizer.decode(lm.tokenizer("a = b").input_ids) == "a = b"


def test_a_loaded_model_is_in_eval_mode_and_wants_no_gradients(tiny_llama: Path) -> None:
    model = load(tiny_llama).model
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_encoder_loads_and_is_not_causal(bert: Any, tiny_llama: Path, tmp_path: Path) -> None:
    lm = load(str(bert_folder(bert, tiny_llama, tmp_path / "bert")))
    assert not lm.is_causal
    assert lm.n_layers == 3


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_dtype_is_the_one_asked_for(dtype: str, expected: torch.dtype, tiny_llama: Path) -> None:
    assert {weight.dtype for weight in load(tiny_llama, dtype=dtype).model.parameters()} == {expected}


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)],
)
def test_auto_is_bfloat16_where_the_processor_computes_it(
    capabilities: dict[str, bool], expected: torch.dtype, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert load(tiny_llama, dtype="auto").model.dtype == expected


def test_an_unknown_dtype_or_device_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="dtype 'float8' is unknown: choose float32, bfloat16 or auto"):
        load(tiny_llama, dtype="float8")
    with pytest.raises(InputError, match="device 'abacus' cannot be used"):
        load(tiny_llama, device="abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_this_machine_lacks_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="device 'cuda' cannot be used on this machine"):
        load(tiny_llama, device="cuda")


@pytest.mark.usefixtures("apportion_cache", "no_network")
def test_a_packaged_model_that_is_not_there_is_refused_with_the_command_that_gets_it() -> None:
    with pytest.raises(InputError, match="smollm2 is not on this machine yet: run `apportion fetch smollm2`"):
        load("smollm2")


@pytest.mark.parametrize("name", ["smolm2", "no-such/model", "./nowhere", "a/b/c", "/nowhere/at all", ""])
def test_no_such_model_is_refused_with_what_would_work(name: str) -> None:
    with pytest.raises(InputError, match=r"smollm2, minilm.*folder.*Hugging Face id"):
        load(name)


@pytest.mark.usefixtures("no_network")
def test_what_looks_like_a_path_is_not_looked_up_on_the_network(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "file.gguf").touch()
    with pytest.raises(InputError, match="is not a folder"):
        load(tmp_path / "file.gguf")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"folder without config\.json"):
        load(tmp_path)


def test_a_truncated_model_is_refused(tiny_copy: Path) -> None:
    weights = tiny_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="could not be loaded"):
        load(tiny_copy)


def test_a_model_that_lacks_weights_is_refused(tiny_copy: Path) -> None:
    config = json.loads((tiny_copy / "config.json").read_text())
    (tiny_copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(InputError, match=r"lacks weights for model\.layers\.3"):
        load(tiny_copy)


def test_pickled_weights_are_not_read(tiny_copy: Path) -> None:
    (tiny_copy / "model.safetensors").rename(tiny_copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"could not be loaded .*safetensors"):
        load(tiny_copy)


def test_a_model_of_an_unknown_family_is_refused() -> None:
    with pytest.raises(InputError, match="in a way that apportion does not know"):
        wrap(nn.Linear(2, 2))


def test_loading_prints_nothing(bert: Any, tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encoder = bert_folder(bert, tiny_llama, tmp_path / "bert")
    capfd.readouterr()  # transformers says that it writes
    load(tiny_llama)
    load(encoder)
    assert capfd.readouterr() == ("", "")


# --- fingerprint


def test_the_fingerprint_is_that_of_the_weights_whatever_the_folder_and_dtype(
    tiny_llama: Path, tiny_copy: Path
) -> None:
    assert load(tiny_llama).fingerprint == load(tiny_copy).fingerprint == load(tiny_llama, dtype="bfloat16").fingerprint


def test_other_weights_have_another_fingerprint(tiny_llama: Path) -> None:
    lm, other = load(tiny_llama), load(tiny_llama)
    other.model.model.layers[2].mlp.down_proj.weight.mul_(1.1)
    assert lm.fingerprint != other.fingerprint


# --- losses


def losses_from_logits(logits: Tensor, input_ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), input_ids[:, 1:], reduction="none")


def test_losses_are_those_of_the_models_own_logits(
    causal_model: Any, outputs: Any, input_ids: Tensor, attention_mask: Tensor
) -> None:
    for mask in (None, attention_mask):
        expected = losses_from_logits(outputs(causal_model, input_ids, mask), input_ids)
        torch.testing.assert_close(wrap(causal_model).loss_per_token(input_ids, mask), expected, rtol=1e-5, atol=1e-5)


def test_gemmas_squashing_of_the_logits_is_in_its_losses(input_ids: Tensor) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, initializer_range=1.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        expected = losses_from_logits(model(input_ids).logits, input_ids)
    torch.testing.assert_close(wrap(model).loss_per_token(input_ids), expected)


def test_losses_hear_a_splice(llama: Any, outputs: Any, input_ids: Tensor) -> None:
    with splice(llama, Site(1, "residual"), torch.zeros_like):
        expected = losses_from_logits(outputs(llama, input_ids), input_ids)
        torch.testing.assert_close(wrap(llama).loss_per_token(input_ids), expected)


def test_logits_are_computed_some_tokens_at_a_time(
    llama: Any, input_ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = wrap(llama).loss_per_token(input_ids)
    monkeypatch.setattr(language, "LOGITS_AT_ONCE", 5 * 97)
    sizes: list[int] = []
    handle = llama.lm_head.register_forward_hook(lambda _, args, logits: sizes.append(logits.shape[0]))
    in_parts = wrap(llama).loss_per_token(input_ids)
    handle.remove()
    assert sizes == [5, 5, 2]
    torch.testing.assert_close(in_parts, whole)


def test_losses_are_float32_in_a_bfloat16_model(tiny_llama: Path, input_ids: Tensor) -> None:
    losses = load(tiny_llama, dtype="bfloat16").loss_per_token(input_ids)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, load(tiny_llama).loss_per_token(input_ids), rtol=0.05, atol=0.1)


def test_one_token_has_no_next(llama: Any) -> None:
    with pytest.raises(ValueError, match="at least 2 tokens a row"):
        wrap(llama).loss_per_token(torch.ones(3, 1, dtype=torch.int64))


def test_an_encoder_has_neither_losses_nor_a_logit_lens(bert: Any, input_ids: Tensor) -> None:
    with pytest.raises(
        InputError, match=r"tiny \(BertModel\) does not predict the next token, so it has no next-token"
    ):
        wrap(bert).loss_per_token(input_ids)
    with pytest.raises(InputError, match=r"tiny \(BertModel\).*logit lens"):
        wrap(bert).unembedding()


# --- logit lens


def test_the_lens_on_the_last_layer_shows_the_models_logits(causal_model: Any, outputs: Any, input_ids: Tensor) -> None:
    lm = wrap(causal_model)
    weight, final_norm = lm.unembedding()
    assert weight.shape == (97, lm.d_model)
    last = Site(lm.n_layers - 1, "residual")
    logits = final_norm(capture(lm, [last], input_ids)[last]) @ weight.T
    bias = getattr(causal_model.lm_head, "bias", None)
    if bias is not None:
        logits = logits + bias
    cap = getattr(causal_model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    torch.testing.assert_close(logits, outputs(causal_model, input_ids), rtol=1e-4, atol=1e-4)


def test_the_gain_of_the_final_norm_is_what_it_multiplies_by(
    causal_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = wrap(causal_model)
    _, final_norm = lm.unembedding()
    if isinstance(final_norm, nn.Identity):
        assert torch.equal(lm.final_norm_gain(), torch.ones(32))
        return
    assert isinstance(final_norm, nn.Module)
    offset = 1.0 if "Gemma" in type(final_norm).__name__ else 0.0
    weight = torch.linspace(0.5, 2.0, 32)
    monkeypatch.setitem(final_norm._parameters, "weight", nn.Parameter(weight - offset, requires_grad=False))
    torch.testing.assert_close(lm.final_norm_gain(), weight, rtol=1e-4, atol=1e-4)


# --- the hub


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def model_info(_: Any, name: str, timeout: float) -> None:
        asked.append(name)
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(InputError, match=r"'some/model' is not on this machine.*\(Name or service not known\)"):
        load("some/model")
    assert asked == ["some/model"]


def test_a_model_that_the_hub_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def model_info(_: Any, name: str, timeout: float) -> None:
        error = huggingface_hub.errors.RepositoryNotFoundError
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(InputError, match="the Hugging Face hub shows you no model 'smolm2'"):
        load("smolm2")


def test_a_model_in_the_hubs_own_cache_needs_no_hub(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123abc"
    shutil.copytree(tiny_llama, snapshot)
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        if hasattr(sys.modules.get(module), "HF_HUB_CACHE"):
            monkeypatch.setattr(sys.modules[module], "HF_HUB_CACHE", str(tmp_path))
    lm = load("some/model")
    assert lm.name == "some/model"
    assert lm.fingerprint == load(tiny_llama).fingerprint
