"""Random data of one size, for whatever is timed at it: keys and values where the engine would have them.

Shapes: S slots of an arena, Hkv KV heads, D head dimension.
"""

from dataclasses import replace

import numpy as np
import torch

from engine.attention import Keeps
from engine.attention.pass_plan import PassPlan
from engine.bench.micro.micro_results import Sizes
from engine.kv_cache import KVCache
from engine.presets import find_preset


def num_slots(sizes: Sizes, keeps: Keeps) -> int:
    """Slots of the arena, without a plan: that of sizes which do not fit would not fit either."""
    if keeps is Keeps.HISTORIES:
        return sizes.batch_size * (sizes.num_shared + sizes.num_unique)
    return sizes.num_shared + sizes.batch_size * sizes.num_unique


class Workload:
    """Random numbers, the same for everything that takes turns."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype, seed: int):
        self.sizes, self.device, self.dtype, self._seed = sizes, device, dtype, seed
        self.scale = sizes.head_dim**-0.5

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return _normal(shape, self._generator(), dtype or self.dtype)

    def filled_arenas(self, plan: PassPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, ``(S, Hkv, D)``, filled as the engine does it: the prompt where its node lies, copies of it
        where the method keeps them."""
        sizes, placement, generator = self.sizes, plan.placement, self._generator()
        config = replace(find_preset("tiny"), num_layers=1, head_dim=sizes.head_dim)
        cache = KVCache(config, sizes.num_kv_heads, plan.num_slots, self.dtype, self.device)
        sequences = np.arange(sizes.batch_size)
        prompt = int(placement.node_starts[0]) if sizes.num_shared else 0
        ranges = [(prompt, sizes.num_shared)]
        ranges += [(start, sizes.unique_seq_len) for start in placement.suffix_starts(sequences).tolist()]
        for arena in cache.layer(0):
            for start, length in ranges:
                if length:
                    shape = (length, sizes.num_kv_heads, sizes.head_dim)
                    arena[start : start + length] = _normal(shape, generator, self.dtype)
        if sizes.num_shared:
            targets = placement.copies(0, sequences).tolist()
            cache.copy(prompt, sizes.num_shared, [target for target in targets if target != prompt])
        return cache.layer(0)

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self._seed)


def _normal(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)
