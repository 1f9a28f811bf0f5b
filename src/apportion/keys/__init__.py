"""The keys room: which keys a query reads, and what is stored of them.

Every method is a point on three axes: a `Selector` says which tokens a query reads, a `Store` says what is kept of a
token, and both spend a `KeyBudget` that one `Usage` accounts for. A `KeyMethod` puts them into a decoder::

    with DoubleSparsity(budget=KeyBudget(share=1 / 16)).fit(lm, texts)(lm):
        lm.generate(prompt)
"""

from apportion.keys.baselines import DenseKeys, OracleKeys, RandomKeyChoice, WindowKeys
from apportion.keys.budget import KeyBudget, Usage
from apportion.keys.cskv import CSKV
from apportion.keys.double_sparsity import DoubleSparsity
from apportion.keys.loki import Loki
from apportion.keys.matryoshka_kv import MatryoshkaKV
from apportion.keys.memory import ComposedMemory
from apportion.keys.method import KeyMethod, OpenMethod, read_method
from apportion.keys.quest import Quest
from apportion.keys.routing_transformer import FollowTokens, Routed, RoutingAttention, RoutingSettings
from apportion.keys.sea import SeaAttention, SeaOutput, SeaSettings
from apportion.keys.sea_distillation import attention_losses, fit_to_trace, mass_on_trace, model_loss
from apportion.keys.seer_attention import SeerAttention
from apportion.keys.selecting import SelectingMethod
from apportion.keys.selection import KeySelection
from apportion.keys.selectors import Selector
from apportion.keys.shadow_kv import ShadowKV
from apportion.keys.snap_kv import SnapKV
from apportion.keys.sparq import SparQ
from apportion.keys.stores import ExactStore, Store
from apportion.keys.streaming_llm import StreamingLLM
from apportion.keys.trace import Trace, compare_on_trace, record_trace

__all__ = [
    "CSKV",
    "ComposedMemory",
    "DenseKeys",
    "DoubleSparsity",
    "ExactStore",
    "FollowTokens",
    "KeyBudget",
    "KeyMethod",
    "KeySelection",
    "Loki",
    "MatryoshkaKV",
    "OpenMethod",
    "OracleKeys",
    "Quest",
    "RandomKeyChoice",
    "Routed",
    "RoutingAttention",
    "RoutingSettings",
    "SeaAttention",
    "SeaOutput",
    "SeaSettings",
    "SeerAttention",
    "SelectingMethod",
    "Selector",
    "ShadowKV",
    "SnapKV",
    "SparQ",
    "Store",
    "StreamingLLM",
    "Trace",
    "Usage",
    "WindowKeys",
    "attention_losses",
    "compare_on_trace",
    "fit_to_trace",
    "mass_on_trace",
    "model_loss",
    "read_method",
    "record_trace",
]
