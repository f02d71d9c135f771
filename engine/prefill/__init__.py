"""How prompts are read: with all of attention, or with a sparse pattern for each head. Decoding is another matter."""

from engine.prefill.head_config import get_support_models
from engine.prefill.method import (
    DENSE,
    MINFERENCE,
    PREFILL_METHODS,
    PrefillMethod,
    check_prefill,
    method_order,
    parse_prefill,
)
from engine.prefill.sparse import SparsePrefill

__all__ = [
    "DENSE", "MINFERENCE", "PREFILL_METHODS", "PrefillMethod", "SparsePrefill", "check_prefill",
    "get_support_models", "method_order", "parse_prefill",
]  # fmt: skip
