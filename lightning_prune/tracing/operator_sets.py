"""Names of torch operators that several modules treat alike, as in ``OpOverload._opname``."""

from __future__ import annotations

CONVOLUTIONS = frozenset({"convolution", "_convolution"})

#: Batch norms that traces of networks in eval mode contain. With constant statistics they scale and shift each
#: channel, so a compiler can make them part of the convolution before them.
EVAL_BATCH_NORMS = frozenset(
    {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"}
)
