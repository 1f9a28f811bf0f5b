"""SeerAttention (Gao et al. 2024, arXiv 2410.13276, v4): a small gate learns which blocks of keys a prompt needs.

Allocated are blocks of keys, to each block of a prompt's queries, for every layer and query head. A gate of two linear
maps scores pooled queries against pooled keys; it is distilled from the model's own attention, the model stays as it
is. Chosen are the k best blocks of a row, or all above one threshold, which lets rows, heads and layers share.
``decode=True`` is SeerAttention-R (Gao et al. 2025, arXiv 2506.08889): the prompt is dense, and every later token reads
blocks that a gate chose for its key-value head.

| paper | here |
|---|---|
| B | ``size`` |
| d_gate | ``width`` |
| P_q, P_k (poolings) | ``query_pooling``, ``key_pooling`` |
| W_q, W_k | ``Gate.query_weight``, ``Gate.key_weight`` |
| S, gt | ``Gate.logits``, ``Example.truth`` |
| k, threshold, sparsity s | ``blocks``, ``threshold``, ``sparsity`` |

Departures:

- The rotary embedding of the gate takes the model's own frequencies, read off its rotations and resampled on a
  logarithmic scale where ``width`` is not the width that the model rotates (for ordinary rotary embeddings that is
  what the model would compute for a head of this width). Positions are slots, which differ from positions by a
  constant of the row; scores depend on differences alone. A model without rotary embedding has gates without.
- The learning rate falls linearly after the warm-up, not as a cosine, as all training here does. Adam is AdamW without
  weight decay. Gradients of all layers are clipped together, at norm 1.
- With ``held_out`` texts, each layer keeps its weights of the step that did best on them (the paper keeps the last).
- The gate's score of a prompt in chunks, and what is dense then: see ``keys.blocks``. The last two rows of blocks are
  dense in every chunk.
- SeerAttention-R: the block of the token itself is never scored, in training or later, so that no pooled key has seen a
  later token. The target's rows are an even sample of at most 1024 tokens of the second half.
- Fine-tuning of the model under sparse attention (its appendix A.2) is not here: gates only.
"""

from apportion.keys.seer_attention.fitting import GateRecipe, KeepBest, gate_loss, train_gates
from apportion.keys.seer_attention.gate import DecodeGates, Example, Gate, Gates, PromptGates
from apportion.keys.seer_attention.method import SeerAttention
from apportion.keys.seer_attention.reading import DecodeGate, GateBlocks

__all__ = [
    "DecodeGate",
    "DecodeGates",
    "Example",
    "Gate",
    "GateBlocks",
    "GateRecipe",
    "Gates",
    "KeepBest",
    "PromptGates",
    "SeerAttention",
    "gate_loss",
    "train_gates",
]
