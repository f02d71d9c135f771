"""Where a sequence's numbers stop being finite: looked for once it is known that they do.

A check of every layer in every step would cost more than it finds. So a sequence whose logits hold NaN runs once more,
alone, and every layer's output is looked at.
"""

import numpy as np
import torch

from engine.attention import AttentionMethod
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
        hidden = _executor(model, method, tokens).prefill()
        logits = model.logits(hidden)[:, : model.head.num_real]
    finally:
        for hook in hooks:
            hook.remove()
    if not found and not all(model.group.gather_objects(bool(logits.isfinite().all()))):
        found.append("the output head")
    return found[0] if found else None


def _executor(model: Transformer, method: AttentionMethod, tokens: list[int]) -> Executor:
    """Of one sequence, in a cache of its own."""
    tree, rooms = build_from_prompts([tokens]), np.array([len(tokens)])
    ranges = method.ranges(tree, rooms, {})
    placement = method.place(tree, rooms, {}, [sum(ranges[:i]) for i in range(len(ranges))])
    weight, cache = model.embedding.weight, None
    if method.uses_cache:
        cache = KVCache(model.config, model.num_kv_heads, sum(ranges), weight.dtype, weight.device)
    return Executor(model, cache, method, tree, placement, {})
