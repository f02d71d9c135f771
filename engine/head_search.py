"""The search for each head's sparse pattern in a loaded model: its prompts are read with dense attention, and in every
layer the candidates are tried beside it.

Shapes: T tokens of a prompt.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import astuple, replace

import numpy as np
import torch

from engine.config import ModelConfig
from engine.errors import InputError
from engine.kv_cache import KVCache
from engine.model import Step, Transformer
from engine.prefill.search import Candidate, LayerScores, Place, SearchPlan
from engine.rope import rope_length
from kernels import AttentionPlan
from kernels.segment import Segment
from kernels.sparse import SparsePlan, SparseRows


def score_heads(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Candidate],
    done: Mapping[Place, LayerScores],
    on_scores: Callable[[Place, LayerScores], None] = lambda *_: None,
    on_candidate: Callable[[], None] = lambda: None,
) -> dict[Place, LayerScores]:
    """The scores of every candidate for all of the model's heads, by prompt and layer: ``done``, and what it lacks.

    SPMD: each rank scores its own heads, all get the scores of all. ``on_scores`` is called on every rank as soon as
    those of a layer are there; ``on_candidate`` after each candidate of a layer.

    Raises InputError for a model with a sliding window, prompts that are too long for it, and numbers that are not
    finite.
    """
    check_searchable(model.config, max(map(len, prompts)))
    found = dict(done)
    for number, tokens in enumerate(prompts):
        missing = {layer for layer in range(model.config.num_layers) if (number, layer) not in found}
        if not missing:
            continue

        def keep(layer: int, own: LayerScores) -> None:
            every = model.group.gather_objects(own)
            joined = tuple(sum(of_ranks, ()) for of_ranks in zip(*every, strict=True))
            if not all(math.isfinite(x) for of_heads in joined for score in of_heads for x in astuple(score)):
                raise InputError(
                    f"attention of layer {layer} is not finite for prompt {number}; accepted: models whose numbers are "
                    "finite; use a --dtype of wider range (bfloat16 or float32), or other weights"
                )
            found[number, layer] = joined
            on_scores((number, layer), joined)

        _read(model, tokens, candidates, missing, keep, on_candidate)
    return found


def check_searchable(config: ModelConfig, num_tokens: int) -> None:
    """Raises InputError for a model whose attention cannot be sparse, or that has no room for so many tokens."""
    if config.sliding_window is not None:
        raise InputError(
            f"the model has a sliding window of {config.sliding_window} tokens; accepted: models without one, whose "
            "heads see all keys"
        )
    if num_tokens > config.max_positions:
        raise InputError(
            f"a context of {num_tokens} tokens was asked for; accepted: up to {config.max_positions}, the model's "
            "positions; lower it"
        )


def _read(
    model: Transformer,
    tokens: Sequence[int],
    candidates: Sequence[Candidate],
    layers: Set[int],
    on_scores: Callable[[int, LayerScores], None],
    on_candidate: Callable[[], None],
) -> None:
    """One forward pass of one prompt."""
    T, weight, backend = len(tokens), model.embedding.weight, model.attention_backend
    model.prepare(T, rope_length(model.config, T))
    segment = Segment(np.array([0, T]), np.array([0]), np.array([T]), causal=True)
    dense = AttentionPlan.of([segment], weight.device, weight.dtype, backend)
    sparse = SparsePlan(SparseRows.contiguous([T], [0], [T]), weight.device, weight.dtype, backend)
    plan = SearchPlan(dense, sparse, candidates, layers, on_scores, on_candidate)
    positions = torch.arange(T, device=weight.device)
    last = torch.tensor([T - 1], device=weight.device)
    step = Step(torch.tensor(tokens, device=weight.device), positions, positions, last, model.operations_backend)
    model(step, plan, _CacheOfOneLayer(model, T))


class _CacheOfOneLayer(KVCache):
    """All layers write to the same place: nothing reads a layer's keys once its attention is done."""

    def __init__(self, model: Transformer, num_slots: int):
        weight = model.embedding.weight
        config = replace(model.config, num_layers=1)
        super().__init__(config, model.num_kv_heads, num_slots, weight.dtype, weight.device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return super().layer(0)
