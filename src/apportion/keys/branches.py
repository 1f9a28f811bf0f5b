"""What many methods make of one context that was read once: logits, answers, and what reading cost.

Most of the work of a comparison is the dense prefill, the same for every method that leaves it dense. It is done once
(`Fan`); each method takes its keys and values in and closes. What follows goes through the model as rows of one batch
(`SideBySide`): a few tokens at a time leave most of a processor idle, those of all methods together do not.
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
from apportion.keys.shared_prompt import Fan
from apportion.keys.side_by_side import SideBySide
from apportion.models import LanguageModel
from apportion.models.key_door import attend_with, close_prompt, memories_of, with_memories

# Of one pass, at most: logits and copies of the caches should not fill the memory.
_ROWS = 64


@torch.no_grad()
def go_on(
    model: LanguageModel,
    context: Int[Tensor, " context_tokens"],
    later: Int[Tensor, "rows later_tokens"],
    methods: Mapping[str, MakeComposed],
    *,
    keep: int = 0,
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
        keep: of how many of the last tokens the logits are wanted; 0 for all.

    Yields:
        The method's name, the logits at every later token (or the last of them), and the cost of reading, over all
        layers and rows.
    """
    many = len(later)
    with attend_with(model, lambda facts: Fan(facts, [make(facts) for make in methods.values()])):
        prompt = model.model(context[None], use_cache=True, logits_to_keep=1).past_key_values
        fans = [fan for fan in memories_of(prompt) if isinstance(fan, Fan)]
        for places in torch.arange(len(methods)).split(max(1, _ROWS // many)):
            own = with_memories(prompt, [SideBySide([fan.made[place] for place in places]) for fan in fans])
            close_prompt(own)
            if many > 1:
                rows = torch.zeros(many, dtype=torch.long, device=later.device)
                for memory in (fan.made[place] for fan in fans for place in places):
                    memory.pick_rows(rows)
            repeated = later.repeat(len(places), 1)
            logits = model.model(repeated, past_key_values=own, logits_to_keep=keep).logits
            for place, of_method in zip(places, logits.split(many), strict=True):
                yield list(methods)[place], of_method, Usage.total(fan.made[place].usage for fan in fans)


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
    # What comes before the first answer is not asked for.
    passed = min(len(question) for _, question, _ in parts) - 1
    found: dict[str, list[Answered]] = {}
    for name, logits, usage in go_on(model, context, later, methods, keep=later.shape[1] - passed):
        found[name] = []
        for place, (_, question, answer) in enumerate(parts):
            row = logits[place, len(question) - 1 - passed : len(rows[place]) - passed]
            found[name].append(Answered(*exact_and_nll(row, answer), place, usage))
    return found
