"""Text that a model writes: several prompts at once, the same text for the same seed."""

from collections.abc import Sequence
from typing import Any

import torch

from apportion.errors import InputError
from apportion.models.language import LanguageModel
from apportion.models.quiet import quiet_transformers


def encode_prompts(lm: LanguageModel, prompts: Sequence[str], *, chat: bool = False) -> dict[str, Any]:
    """Prompts as ``input_ids`` and ``attention_mask`` on the model's device, padded on the left.

    Args:
        lm: the model, with its tokenizer.
        prompts: at least one.
        chat: put each prompt into the tokenizer's chat template, as the user's turn.

    Raises:
        InputError: no prompt, an empty one, or a tokenizer without chat template.
    """
    if not prompts or not all(prompts):
        raise InputError("a prompt is empty: give some text to go on from")
    tokenizer = lm.tokenizer
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(f"{lm.name} has no chat template: give the prompt as plain text, without chat")
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
    # A chat template has written the special tokens already.
    rows = [tokenizer(prompt, add_special_tokens=not chat)["input_ids"] for prompt in prompts]
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), _padding(lm), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = torch.tensor(row)
        mask[number, length - len(row) :] = 1
    return {"input_ids": ids.to(lm.device), "attention_mask": mask.to(lm.device)}


@torch.no_grad()
def generate(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> list[str]:
    """What the model writes after each prompt. Splices in force are in force here too.

    Args:
        lm: a causal model with its tokenizer.
        prompts: see ``encode_prompts``.
        tokens: to write, unless the model ends its text before.
        temperature: 0 always takes the likeliest token; above, tokens are drawn.
        seed: of the draws; nobody else's random numbers are touched.
        chat: see ``encode_prompts``.

    Raises:
        InputError: the model does not predict the next token; a prompt that cannot be used; ``tokens`` below 1 or a
            negative temperature.
    """
    from transformers import GenerationConfig

    if not lm.is_causal:
        raise InputError(f"{lm.name} does not predict the next token, so it writes no text: use smollm2, for example")
    if tokens < 1:
        raise InputError(f"tokens={tokens}: at least 1")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature={temperature}: 0 (the likeliest token) or above, such as 0.8")
    given = encode_prompts(lm, prompts, chat=chat)
    own = getattr(lm.model, "generation_config", None)
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=tokens, eos_token_id=getattr(own, "eos_token_id", None), pad_token_id=_padding(lm), **drawing
    )
    devices = [lm.device] if lm.device.type == "cuda" else []
    with quiet_transformers(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        out = lm.model.generate(**given, generation_config=config)
    written = out[:, given["input_ids"].shape[1] :]
    return [lm.tokenizer.decode(row, skip_special_tokens=True) for row in written]


def _padding(lm: LanguageModel) -> int:
    """Any token will do where the mask says that there is none."""
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(lm.tokenizer, name, None)
        if token is not None:
            return int(token)
    return 0
