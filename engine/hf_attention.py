"""Sparse prefill in other people's models: an attention implementation for transformers.

    from engine import register_sparse_attention
    name = register_sparse_attention()  # "tributary_minference"
    model = AutoModelForCausalLM.from_pretrained("...", attn_implementation=name)

The model stays as it is. Prompts are read by the sparse pattern of each head; short ones, and tokens that are
generated, see all keys. Batches may be padded on either side, and the cache may be one of a fixed size.

Shapes: B batch, H query heads, Hkv KV heads, Q queries, N keys, D head dimension, T queries of all members.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from engine.errors import InputError
from engine.prefill.head_config import HeadPatterns
from engine.prefill.method import MINFERENCE, PrefillMethod, parse_prefill
from kernels import AttentionPlan, Segment
from kernels.arena_view import as_arenas
from kernels.sparse import SparsePlan, SparseRows, lower

_PREFIX = "tributary_"
# Of what models hand to their attention: what changes the result, and no kernel here has.
_REFUSED = ("sliding_window", "softcap", "s_aux", "position_bias", "cu_seq_lens_q", "cu_seq_lens_k")


def register_sparse_attention(prefill: str = MINFERENCE) -> str:
    """Makes a prefill method known to transformers, and returns the name for ``attn_implementation``: ``tributary_``
    and the method's, without its options. Registered again with others, those count for models that run from then on.

    Raises InputError for a method that is not known, and without transformers 5.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise InputError(
            'this needs transformers 5; run in the repository\'s root: pip install -e ".[transformers]"'
        ) from error
    method = parse_prefill(prefill)
    name = _PREFIX + method.name
    AttentionInterface.register(name, _Attention(method))
    AttentionMaskInterface.register(name, _mask)
    return name


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    mask_function: Callable[..., Any] | None = None,
    config: Any = None,
    **_: Any,
) -> torch.Tensor | None:
    """What ``_Attention`` takes as its mask: ``(B, N)`` bool, which keys up to the last query are none of padding; None
    where there is no padding and no key beyond the last query.

    Raises ValueError where more than padding and causality is asked for, as with packed documents, and for a model that
    computes its attention by itself: it would go by this mask, which says nothing of causality.
    """
    from transformers.masking_utils import causal_mask_function
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    model = MODEL_MAPPING.get(type(config), None)
    if not getattr(model, "_supports_attention_backend", True):
        raise ValueError(
            f"{model.__name__} computes its attention by itself; accepted: models that take theirs from "
            "attn_implementation; use another one"
        )
    if mask_function not in (None, causal_mask_function):
        raise ValueError(
            "the model asks for a mask other than causal: a sliding window, chunks, packed documents (position_ids "
            "that begin anew) or one of its own; accepted: causal masks and padding; use another attn_implementation"
        )
    num_keys = int(q_offset) + q_length
    if attention_mask is None:
        mask = torch.ones(batch_size, num_keys, dtype=torch.bool)
    elif attention_mask.shape[-1] < num_keys:
        raise ValueError(
            f"the attention mask has {attention_mask.shape[-1]} keys; accepted: all {num_keys} up to the last query, "
            "those in the cache too"
        )
    else:
        mask = attention_mask[:, :num_keys].bool().cpu()  # once for all layers
    # A cache of a fixed size has more keys than there are yet.
    return None if num_keys == kv_length and mask.all() else mask


@dataclass(frozen=True)
class _Shape:
    """What of a model's config a prefill method looks at."""

    num_layers: int
    num_heads: int
    sliding_window: int | None = None  # layers that have one are refused by themselves


class _Attention:
    """The attention of one module, as transformers calls it."""

    def __init__(self, method: PrefillMethod):
        self._method = method
        self._heads = cache(self._find_heads)

    def _find_heads(self, model_name: str, num_layers: int, num_heads: int) -> HeadPatterns:
        if note := self._method.note(model_name):
            print(f"notice: {note}", file=sys.stderr)
        return self._method.heads(model_name, _Shape(num_layers, num_heads))

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        """``query (B, H, Q, D)``, ``key`` and ``value (B, Hkv, N, D)``; ``(B, Q, H, D)``, 0 for padding.

        Raises ValueError for what a model asks for and this does not have: gradients, dropout, windows, biases.
        """
        self._check(module, query, value, dropout, is_causal, more)
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        spans = _spans(attention_mask, query.shape[0], key.shape[2])
        k_SHD, v_SHD, starts = as_arenas(key, value)
        B, _, Q, _ = query.shape
        num_keys = key.shape[2] if attention_mask is None else attention_mask.shape[1]
        # Of each member the queries that are none of padding: those at the positions from ``num_keys - Q`` on.
        first = [min(max(begin - (num_keys - Q), 0), Q) for begin, _ in spans]
        last = [max(min(end - (num_keys - Q), Q), 0) for _, end in spans]
        q_lens = [max(b - a, 0) for a, b in zip(first, last, strict=True)]
        parts = [query[b, :, f : f + n].transpose(0, 1) for b, (f, n) in enumerate(zip(first, q_lens, strict=True))]
        q_THD = torch.cat(parts)
        k_starts = [start + begin for start, (begin, _) in zip(starts, spans, strict=True)]
        k_lens = [end - begin if n else 0 for (begin, end), n in zip(spans, q_lens, strict=True)]
        found = self._attend(module, q_THD, k_SHD, v_SHD, q_lens, k_starts, k_lens, scale)
        if q_lens == [Q] * B:
            return found.unflatten(0, (B, Q)), None
        out = query.new_zeros(B, Q, *found.shape[1:])
        for b, part in enumerate(found.split(q_lens)):
            out[b, first[b] : first[b] + q_lens[b]] = part
        return out, None

    def _attend(
        self,
        module: torch.nn.Module,
        q_THD: torch.Tensor,
        k_SHD: torch.Tensor,
        v_SHD: torch.Tensor,
        q_lens: Sequence[int],
        k_starts: Sequence[int],
        k_lens: Sequence[int],
        scale: float,
    ) -> torch.Tensor:
        """``(T, H, D)`` in the queries' dtype, of rows of packed queries."""
        # A single token is one that was generated.
        is_dense = [self._method.is_dense or n < max(self._method.dense_below, 2) for n in q_lens]
        if all(is_dense):
            offsets = np.append(0, np.cumsum(q_lens)).astype(np.int64)
            segment = Segment(offsets, np.array(k_starts), np.array(k_lens), causal=True)
            return AttentionPlan.of([segment], q_THD.device, q_THD.dtype).run(q_THD, k_SHD, v_SHD, scale)
        config = module.config
        heads = self._heads(config._name_or_path, config.num_hidden_layers, config.num_attention_heads)
        rows = SparseRows.contiguous(q_lens, k_starts, k_lens)
        index = lower(heads[module.layer_idx], q_THD, k_SHD, rows, scale, is_dense)
        plan = SparsePlan(rows, q_THD.device, q_THD.dtype)
        return plan.run(q_THD, k_SHD, v_SHD, index, scale)[0].to(q_THD.dtype)

    def _check(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        value: torch.Tensor,
        dropout: float,
        is_causal: bool | None,
        more: dict[str, Any],
    ) -> None:
        name = _PREFIX + self._method.name
        if torch.is_grad_enabled() and query.requires_grad:
            raise ValueError(f"{name} has no gradients; accepted: inference; call the model in torch.no_grad()")
        if dropout:
            raise ValueError(f"{name} has no dropout, and {dropout} was asked for; accepted: 0; call model.eval()")
        if is_causal is False or getattr(module, "is_causal", True) is False:
            raise ValueError(f"{name} is causal, and {type(module).__name__} is not; use another attn_implementation")
        if query.shape[3] != value.shape[3]:
            raise ValueError(
                f"{name} has one head dimension, and {type(module).__name__} has {query.shape[3]} for queries and "
                f"{value.shape[3]} for values; use another attn_implementation"
            )
        for option in _REFUSED:
            if more.get(option) is not None:
                raise ValueError(
                    f"{name} has no {option}, which {type(module).__name__} asks for; use another attn_implementation"
                )


def _spans(mask: torch.Tensor | None, batch_size: int, num_keys: int) -> list[tuple[int, int]]:
    """From where to where each member's keys are none of padding. Raises ValueError for a mask with holes."""
    if mask is None:
        return [(0, num_keys)] * batch_size
    if mask.dim() != 2:
        raise ValueError(
            f"the attention mask has shape {tuple(mask.shape)}; accepted: (batch, keys), of padding at the beginning "
            "or the end; leave it out, or use another attn_implementation"
        )
    mask = mask.cpu().numpy().astype(bool)  # as a loop in Python it would take longer than a decode step
    counts, begins = mask.sum(1), mask.argmax(1)
    ends = np.where(counts > 0, mask.shape[1] - mask[:, ::-1].argmax(1), begins)
    if (ends - begins != counts).any():
        raise ValueError("the attention mask has holes; accepted: padding at the beginning or the end of a prompt")
    return list(zip(begins.tolist(), ends.tolist(), strict=True))
