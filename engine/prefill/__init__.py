"""How prompts are read: with all of attention, or with a sparse pattern for each head. Decoding is another matter."""

from engine.prefill.head_config import get_support_models
from engine.prefill.method import DENSE, PREFILL_METHODS, PrefillMethod, check_prefill, parse_prefill
from engine.prefill.sparse import SparsePrefill

__all__ = [
    "DENSE", "PREFILL_METHODS", "PrefillMethod", "SparsePrefill", "check_prefill", "get_support_models",
    "parse_prefill",
]  # fmt: skip
