"""What many methods make of one context that was read once: logits, answers, and what reading cost.

Most of the work of a comparison is the dense prefill, the same for every method that leaves it dense. It is done once
(`Fan`); each method takes its keys and values in, closes, and goes on by itself.
"""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.data.tasks.shared_context import SharedContext
from apportion.errors import InputError
from apportion.keys.budget import Usage
from apportion.keys.memory import MakeComposed
from apportion.keys.scoring import Answered, encode_parts, exact_and_nll
from apportion.keys.shared_prompt import Fan, usage_of
from apportion.models import LanguageModel
from apportion.models.key_door import attend_with, close_prompt, memories_of, with_memories


@torch.no_grad()
def go_on(
    model: LanguageModel,
    context: Int[Tensor, " context_tokens"],
    later: Int[Tensor, "rows later_tokens"],
    methods: Mapping[str, MakeComposed],
) -> Iterator[tuple[str, Float[Tensor, "rows later_tokens vocabulary"], Usage]]:
    """Read a context once, and let every method take in what follows it, in several ways at once.

    What follows comes in one pass. A method whose queries choose for themselves, as all of the room do by default or
    with ``turn="each"``, gives what token by token would.

    Args:
        model: a decoder.
        context: what all rows begin with.
        later: what each row goes on with.
        methods: names, and what makes a layer's memory; ``some_method.memory`` is one, `ComposedMemory` is dense
            attention.

    Yields:
        The method's name, the logits at every later token, and the cost of reading, over all layers and rows.
    """
    rows = torch.zeros(len(later), dtype=torch.long, device=later.device)
    with attend_with(model, lambda facts: Fan(facts, [make(facts) for make in methods.values()])):
        prompt = model.model(context[None], use_cache=True, logits_to_keep=1).past_key_values
        for place, name in enumerate(methods):
            own = with_memories(prompt, [fan.made[place] for fan in memories_of(prompt) if isinstance(fan, Fan)])
            close_prompt(own)
            own.batch_select_indices(rows)
            logits = model.model(later, past_key_values=own).logits
            yield name, logits, usage_of(own)


def ask_all(
    model: LanguageModel, task: SharedContext, methods: Mapping[str, MakeComposed]
) -> dict[str, list[Answered]]:
    """Ask every turn of a task on its own, of every method, with answers teacher-forced; see `go_on`.

    Args:
        model: a decoder.
        task: a context and its turns, each asked as if it were the first.
        methods: see `go_on`.

    Returns:
        By method, in the order of turns; ``usage`` is of all turns together, shorter ones filled up to the longest.

    Raises:
        InputError: the context is cut into other tokens by another question.
    """
    parts = [encode_parts(model, [task.context, turn.question, turn.answer]) for turn in task.turns]
    context = parts[0][0]
    if any(not torch.equal(context, each[0]) for each in parts):
        raise InputError("the context's last token reaches into a question: begin questions with a space or line break")
    rows = [torch.cat([question, answer])[:-1] for _, question, answer in parts]
    # Shorter rows are filled up at the end, where no query of theirs that counts sees it: the context is read once.
    later = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=int(rows[0][-1]))
    found: dict[str, list[Answered]] = {}
    for name, logits, usage in go_on(model, context, later, methods):
        found[name] = []
        for place, (_, question, answer) in enumerate(parts):
            row = logits[place, len(question) - 1 : len(rows[place])]
            found[name].append(Answered(*exact_and_nll(row, answer), place, usage))
    return found
