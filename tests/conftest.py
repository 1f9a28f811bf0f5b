"""What every test may rely on: checked shapes, one thread, no network, a tiny model."""

import os
import signal

# A shell starts what it puts in the background with Ctrl-C ignored, which processes started from here would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Two pytest workers share two cores; torch reads this once, when it is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

# Without a GPU the CUDA kernels run under Triton's interpreter. Triton reads this once, when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from jaxtyping import install_import_hook

# Before anything imports the package: from here on every annotated shape and type is checked at every call.
install_import_hook("apportion", "runtime_types.check")

import pydoc_data.topics
from pathlib import Path

import pytest
from hypothesis import settings

# A suite that passed passes again: examples are the same at every run, so that none that is new stops a change that
# has nothing to do with it. Looking for new ones is a job of its own: `--hypothesis-profile=explore`.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile("repeatable")


# The rooms whose coverage is measured ([tool.coverage.run] of pyproject.toml).
MEASURED = ("allocate", "ops", "features", "training")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Measure coverage where it counts: the tracer makes tests half as slow again, those of other rooms in vain."""
    if not config.pluginmanager.hasplugin("_cov"):
        return
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).parts[0] not in MEASURED:
            item.add_marker("no_cover")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama and its tokenizer: 3 layers, width 32, 4 query and 2 key-value heads, vocabulary 384."""
    import tokenizers
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([pydoc_data.topics.topics["assignment"]], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(folder)

    end = tokenizer.token_to_id("<|end|>")
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        tie_word_embeddings=True,
        # Large enough that a changed activation moves the logits visibly.
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def apportion_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own, so that it neither sees nor touches the models fetched on this machine."""
    cache = tmp_path / "apportion-cache"
    monkeypatch.setenv("APPORTION_CACHE", str(cache))
    return cache
