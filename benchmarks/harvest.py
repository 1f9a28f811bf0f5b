"""How many tokens a second are harvested, against a plain transformers forward pass over the same tokens."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from apportion.data import Document, corpus
from apportion.errors import InputError
from apportion.models import ActivationStore, harvest, load
from benchmarks.registry import Case, Race, RacePlan, Sample, Unavailable, benchmark, timed

_MODEL, _BATCH, _CONTEXT = "smollm2", 16, 128
_BASELINE = "transformers forward"


@benchmark("harvest", "how many tokens a second are harvested?", rounds=3, share=2)
def plans(smoke: bool) -> Sequence[RacePlan]:
    """One race, in float32; the last block's site costs all blocks, the middle one's about half."""
    try:
        # Packaged models are never fetched here: a benchmark must not wait for a network.
        lm = load(_MODEL)
    except InputError as error:
        raise Unavailable(str(error)) from error
    batches = 1 if smoke else 2
    batch, context = (2, 32) if smoke else (_BATCH, _CONTEXT)
    contexts = batches * batch

    def build() -> Race:
        last = lm.model.config.num_hidden_layers - 1
        documents = _enough_text(contexts * context)

        def harvested(site: str, folder: Path) -> ActivationStore:
            return harvest(
                lm,
                site,
                documents,
                folder,
                context=context,
                # Position 0 of each context and unusually long activations do not count as wanted tokens.
                tokens=contexts * (context - 1),
                batch_size=batch,
                max_norm_ratio=None,
                progress=False,
            )

        with tempfile.TemporaryDirectory() as folder:
            store = harvested(f"layers.{last}.residual", Path(folder) / "store")
            token_ids, *_ = store.gather_contexts(np.arange(contexts), site=None)

        def forward(turn: int) -> None:
            with torch.no_grad():
                for rows in token_ids.split(batch):
                    lm.model(input_ids=rows, use_cache=False)

        def harvesting(site: str) -> Case:
            def once(turn: int) -> None:
                with tempfile.TemporaryDirectory() as folder:
                    harvested(site, Path(folder) / "store")

            includes = f"tokenising, forward up to {site}, norms, bfloat16 to disk, checksums"
            return Case(f"harvest {site}", _with_rate(timed(once), contexts * context), includes)

        plain = Case(
            _BASELINE, _with_rate(timed(forward), contexts * context), "all blocks and the head, tokens given as ids"
        )
        sites = [f"layers.{block}.residual" for block in (last, last // 2)]
        return Race([plain, *map(harvesting, sites)], _BASELINE)

    return [RacePlan("harvest", {"contexts": contexts, "context": context, "batch": batch}, build)]


def _enough_text(tokens: int) -> list[Document]:
    """Documents in memory, so that reading a corpus is not counted; 16 characters a token are more than enough."""
    documents: list[Document] = []
    characters = 0
    for document in corpus("english"):
        documents.append(document)
        characters += len(document.text)
        if characters > 16 * tokens:
            break
    return documents


def _with_rate(measure: Callable[[int], Sample], tokens: int) -> Callable[[int], Sample]:
    def with_rate(turn: int) -> Sample:
        sample = measure(turn)
        return {**sample, "tokens per second": tokens / sample["seconds"]}

    return with_rate
