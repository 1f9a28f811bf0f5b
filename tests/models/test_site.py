import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from apportion.errors import InputError
from apportion.models import LanguageModel, Site

KINDS_OF_A_LAYER = ("residual", "mlp_out", "mlp_in", "attn_out", "heads", "neurons")


@pytest.mark.parametrize("text", ["embeddings", *(f"layers.11.{kind}" for kind in KINDS_OF_A_LAYER)])
def test_a_site_is_written_as_it_was_read(text: str) -> None:
    assert str(Site.parse(text)) == text


def test_a_parsed_site_knows_layer_and_kind() -> None:
    assert Site.parse("layers.9.residual") == Site(9, "residual")
    assert Site.parse("embeddings") == Site(None, "embeddings")


@pytest.mark.parametrize(
    "text", ["", "layers.9", "9.residual", "layers.x.residual", "layers.9.residual.0", "Embeddings"]
)
def test_what_is_no_site_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match=r"layers\.9\.residual"):
        Site.parse(text)


def test_an_unknown_kind_is_refused_with_the_kinds_there_are() -> None:
    with pytest.raises(InputError, match=r"'resid'.*residual, mlp_out, mlp_in, attn_out, heads, neurons, embeddings"):
        Site.parse("layers.9.resid")


def test_layers_are_counted_from_zero_up() -> None:
    with pytest.raises(InputError, match="counted from 0, got -1"):
        Site.parse("layers.-1.residual")


def test_only_embeddings_has_no_layer() -> None:
    with pytest.raises(InputError, match="needs a layer"):
        Site(None, "residual")
    with pytest.raises(InputError, match="has no layer"):
        Site(3, "embeddings")


@pytest.mark.parametrize("kind", KINDS_OF_A_LAYER)
def test_a_site_resolves_to_the_module_that_a_reader_of_the_source_would_name(
    kind: str, model: Any, blocks: Any, parts: Any
) -> None:
    by_hand = {
        "residual": (blocks[1], "output"),
        "attn_out": (parts(blocks[1])["attention"], "output"),
        "heads": (parts(blocks[1])["attention"], "input"),
        "neurons": (parts(blocks[1])["neurons"], "input"),
        "mlp_in": (parts(blocks[1])["mlp_in"], "input"),
        "mlp_out": (parts(blocks[1])["mlp_out"], "output"),
    }
    module, side = Site(1, kind).resolve(model)
    expected_module, expected_side = by_hand[kind]
    assert side == expected_side
    # BERT's intermediate is its dense layer and an activation: its input is the dense layer's.
    assert module is expected_module or module is getattr(expected_module, "dense", None)


def test_embeddings_are_what_enters_the_first_block(model: Any, blocks: Any) -> None:
    assert Site(None, "embeddings").resolve(model) == (blocks[0], "input")


def test_widths_are_those_of_the_model_but_for_heads_and_neurons(family: str, model: Any) -> None:
    for kind in ("residual", "mlp_out", "mlp_in", "attn_out"):
        assert Site(0, kind).width(model) == 32
    assert Site(None, "embeddings").width(model) == 32
    assert Site(0, "neurons").width(model) == 48
    assert Site(0, "heads").width(model) == (48 if family in ("qwen3", "gemma", "gemma2", "gemma3") else 32)


def test_a_language_model_and_the_model_inside_it_resolve_alike(llama: Any) -> None:
    wrapped = LanguageModel("tiny", llama, tokenizer=None)
    assert Site(2, "heads").resolve(wrapped) == Site(2, "heads").resolve(llama)
    assert Site(2, "heads").width(wrapped) == 32


@pytest.mark.parametrize("kind", KINDS_OF_A_LAYER)
def test_a_layer_that_is_not_there_is_refused_with_the_number_of_layers(kind: str, llama: Any) -> None:
    with pytest.raises(InputError, match="has 3 layers, 0 to 2"):
        Site(3, kind).resolve(llama)


def test_an_unknown_architecture_is_refused_with_what_was_looked_for() -> None:
    with pytest.raises(InputError, match=r"Linear is built in a way .*self_attn\.o_proj \(Llama.*\(BERT\)"):
        Site(0, "residual").resolve(nn.Linear(2, 2))


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a LanguageModel or a torch module, got str"):
        Site(0, "residual").resolve("smollm2")


def test_a_model_with_pictures_is_heard_in_its_language_part() -> None:
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "vocab_size": 97,
        "num_attention_heads": 4,
    }
    config = transformers.Gemma3Config(
        text_config={**text, "num_key_value_heads": 2, "head_dim": 8},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    with torch.device("meta"):
        model = transformers.Gemma3ForConditionalGeneration(config)
    module, side = Site(1, "heads").resolve(model)
    assert module is model.model.language_model.layers[1].self_attn.o_proj
    assert side == "input"
    assert Site(1, "residual").width(model) == 32


def test_importing_models_does_not_import_transformers() -> None:
    code = "import sys, apportion.models; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
