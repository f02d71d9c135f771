"""Where a sequence's numbers stop being finite: looked for once it is known that they do.

A check of every layer in every step would cost more than it finds. So a sequence whose logits hold NaN runs once more,
alone, and every layer's output is looked at.
"""

import numpy as np
import torch

from engine.attention import AttentionMethod, Keeps
from engine.attention.placement import place_in_order
from engine.executor import Executor
from engine.kv_cache import KVCache
from engine.model import Transformer
from engine.prefix_tree import build_from_prompts


def first_not_finite(model: Transformer, method: AttentionMethod, tokens: list[int]) -> str | None:
    """The first part of the model whose output for ``tokens`` is not finite; None when all are, run like this.

    Every rank makes the same call.
    """
    found: list[str] = []

    def look(name: str):
        def hook(_module, _args, output: torch.Tensor) -> None:
            if not found and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    parts = [("the embedding", model.embedding), *((f"layer {layer.index}", layer) for layer in model.layers)]
    parts += [("the last norm", model.norm)]
    hooks = [module.register_forward_hook(look(name)) for name, module in parts]
    try:
        hidden = _executor(model, method, tokens).prefill(np.array([0]))
        logits = model.logits(hidden)[:, : model.head.num_real]
    finally:
        for hook in hooks:
            hook.remove()
    if not found and not all(model.group.gather_objects(bool(logits.isfinite().all()))):
        found.append("the output head")
    return found[0] if found else None


def _executor(model: Transformer, method: AttentionMethod, tokens: list[int]) -> Executor:
    """Of one sequence, in a cache of its own."""
    tree = build_from_prompts([tokens])
    placement, num_slots = place_in_order(tree, method.keeps, np.array([len(tokens)]))
    weight, cache = model.embedding.weight, None
    if method.keeps is not Keeps.NOTHING:
        cache = KVCache(model.config, model.num_kv_heads, num_slots, weight.dtype, weight.device)
    return Executor(model, method, tree, placement, {}, cache)
