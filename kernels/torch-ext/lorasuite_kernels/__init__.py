"""Kernels for comparing and carrying low-rank adapters between models. Tensors in, tensors out: no model is known here.

Notation: subscript `o` old, `n` new; `d` width, `h` head size, `H` query heads, `G` key/value heads, `L` layers,
`m` examples, `r` rank.
"""

from .balance import balance
from .cka import Gram, StreamingCKA, cka, full_gram, gram, hsic
from .dispatch import backend
from .heads import head_similarity
from .neurons import NeuronCandidates, neuron_candidates
from .projection import apply_head_blocks, head_blocks, project_heads
from .shared_gram import SharedGram, shared_gram
from .target_kl import linear_cross_entropy, linear_target_kl

__all__ = [
    "Gram",
    "NeuronCandidates",
    "SharedGram",
    "StreamingCKA",
    "apply_head_blocks",
    "backend",
    "balance",
    "cka",
    "full_gram",
    "gram",
    "head_blocks",
    "head_similarity",
    "hsic",
    "linear_cross_entropy",
    "linear_target_kl",
    "neuron_candidates",
    "project_heads",
    "shared_gram",
]
