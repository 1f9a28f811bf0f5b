"""Every method of the room by its name, with one budget: what the commands and the study of SCBench offer."""

from collections.abc import Callable
from dataclasses import dataclass

from apportion.errors import InputError
from apportion.keys.baselines import DenseKeys, OracleKeys, RandomKeyChoice, WindowKeys
from apportion.keys.budget import KeyBudget
from apportion.keys.cskv import CSKV
from apportion.keys.double_sparsity import DoubleSparsity
from apportion.keys.key_norm import KeyNorm
from apportion.keys.kvpress_adapter import KvPress
from apportion.keys.loki import Loki
from apportion.keys.matryoshka_kv import MatryoshkaKV
from apportion.keys.method import KeyMethod
from apportion.keys.quantized import QuantizedKeys
from apportion.keys.quest import Quest
from apportion.keys.seer_attention import SeerAttention
from apportion.keys.shadow_kv import ShadowKV
from apportion.keys.snap_kv import SnapKV
from apportion.keys.sparq import SparQ
from apportion.keys.streaming_llm import StreamingLLM

_PRESS = "kvpress:"
SINKS = 4  # the sinks of methods that park attention there, unless a budget says otherwise


@dataclass(frozen=True)
class Offered:
    """A method that can be asked for by name.

    Attributes:
        make: the method for a budget, everything else as its paper has it.
        saves: ``reads``: keeps all tokens, and a query reads as many as the budget says. ``bytes``: forgets tokens, and
            keeps as many of a prompt as the budget says, or a share of each token's numbers. ``prompt``: reads a share
            of the prompt's blocks while it takes it in. ``bits``: keeps all tokens in fewer bytes, whatever the
            budget. ``nothing``.
        says: what it does, in a line.
    """

    make: Callable[[KeyBudget], KeyMethod]
    saves: str
    says: str


CATALOGUE: dict[str, Offered] = {
    "dense": Offered(lambda budget: DenseKeys(), "nothing", "a plain cache, read whole"),
    "oracle": Offered(OracleKeys, "reads", "the keys with the largest products: the upper bound"),
    "sinks_and_recent": Offered(WindowKeys, "reads", "the first keys and the newest: what a method has to beat"),
    "random": Offered(RandomKeyChoice, "reads", "keys drawn anew for every query: the floor"),
    "double_sparsity": Offered(DoubleSparsity, "reads", "keys found by a few channels that were chosen before"),
    "quest": Offered(Quest, "reads", "pages of keys found by their bounds"),
    "sparq": Offered(SparQ, "reads", "keys found by the channels that a query is largest in"),
    "loki": Offered(Loki, "reads", "keys found by their leading directions"),
    "shadow_kv": Offered(
        lambda budget: ShadowKV(budget, counted="all", outliers=3, local=1),
        "reads",
        "chunks of keys found by their means, keys of low rank (3 outlier chunks, 1 local one, within the budget)",
    ),
    "seer_attention": Offered(
        lambda budget: SeerAttention(sparsity=1 - _share(budget)),
        "prompt",
        "blocks of the prompt found by a trained gate",
    ),
    "matryoshka_kv": Offered(
        lambda budget: MatryoshkaKV(share=_share(budget)), "bytes", "keys and values in fewer dimensions, head by head"
    ),
    "cskv": Offered(
        lambda budget: CSKV(key_density=_share(budget) / 2, value_density=min(1.0, 1.5 * _share(budget))),
        "bytes",
        "keys and values in fewer directions, joined over heads; values get three times the keys' share",
    ),
    "streaming_llm": Offered(
        lambda budget: StreamingLLM(_with_sinks(budget)), "bytes", "forgets all but the first and the newest tokens"
    ),
    "snap_kv": Offered(SnapKV, "bytes", "keeps what the prompt's last 32 queries look at"),
    "pyramid_kv": Offered(
        lambda budget: SnapKV(budget, pyramid=True), "bytes", "the same with more in lower layers, less in higher ones"
    ),
    "knorm": Offered(KeyNorm, "bytes", "keeps the tokens with the shortest keys"),
    "key_diff": Offered(lambda budget: KeyNorm(budget, by="difference"), "bytes", "keeps keys unlike the mean key"),
    "quantized_2": Offered(lambda budget: QuantizedKeys(bits=2), "bits", "all tokens in 2 bits (KIVI)"),
    "quantized_4": Offered(lambda budget: QuantizedKeys(bits=4), "bits", "all tokens in 4 bits"),
    "quantized_8": Offered(lambda budget: QuantizedKeys(bits=8), "bits", "all tokens in 8 bits"),
}


def offered(name: str) -> Offered:
    """A method of the catalogue, or ``kvpress:NAME`` for a press of kvpress.

    Raises:
        InputError: there is none of that name.
    """
    if name.startswith(_PRESS):
        press = name.removeprefix(_PRESS)
        return Offered(lambda budget: KvPress(press, budget=budget), "bytes", f"the {press} of kvpress")
    if name not in CATALOGUE:
        raise InputError(f"method {name!r}: one of {', '.join(CATALOGUE)}, or kvpress:NAME for a press of kvpress")
    return CATALOGUE[name]


def method_named(name: str, budget: KeyBudget) -> KeyMethod:
    """A method with a budget, by its name; not fitted yet if it needs that.

    Raises:
        InputError: see `offered`; or the method cannot be had with this budget.
    """
    return offered(name).make(budget)


def parse_budget(text: str) -> KeyBudget:
    """A budget as people write it: ``1/16`` or ``0.0625`` is a share of the tokens, ``256`` a number of keys.

    Raises:
        InputError: it is neither.
    """
    above, slash, below = text.strip().partition("/")
    try:
        if not slash and "." not in text:
            return KeyBudget(keys=int(text))
        share = int(above) / int(below) if slash else float(text)
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"budget {text!r}: a share such as 1/16 or 0.0625, or a number of keys such as 256") from error
    return KeyBudget(share=share)


def _share(budget: KeyBudget) -> float:
    """The share that a budget is of what each token takes.

    Raises:
        InputError: it is a number of keys.
    """
    if budget.share is None:
        raise InputError(
            f"budget of {budget.keys} keys: this method saves a share of every token; give one, such as 1/4"
        )
    return budget.share


def _with_sinks(budget: KeyBudget) -> KeyBudget:
    sinks = budget.sinks or min(SINKS, budget.keys or SINKS)
    return KeyBudget(budget.keys, budget.share, sinks, budget.recent)
