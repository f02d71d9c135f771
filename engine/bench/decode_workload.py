"""What the operations of a decode step work on: keys and values where the engine would have them, and queries.

Shapes: B sequences, S slots of an arena, Hq query heads, Hkv KV heads, D head dimension.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from engine.attention import AttentionMethod, Auto, Keeps, get_method
from engine.attention.crossover import ALWAYS, Crossover
from engine.attention.decode_step import DecodePlan, one_prompt, plan_decode
from engine.bench.micro_results import Sizes
from engine.kv_cache import KVCache
from engine.presets import find_preset
from kernels import Segment


@dataclass(frozen=True)
class Mode:
    """A way to attend, which is one of the engine's methods."""

    method: str
    chooses: bool = False  # between reading shared keys once and once for each sequence


MODES = {"base": Mode("hydragen_noshared"), "hydragen": Mode("hydragen"), "auto": Mode("auto", chooses=True)}


def method_of(mode: str, crossover: Crossover = ALWAYS) -> AttentionMethod:
    """``crossover`` is for a mode that chooses."""
    return Auto(crossover) if MODES[mode].chooses else get_method(MODES[mode].method)


@lru_cache(maxsize=8)
def plan_of(sizes: Sizes, mode: str, crossover: Crossover = ALWAYS) -> DecodePlan:
    """The segments of one decode step. Those without keys are left out: nothing is to be timed of them."""
    tree = one_prompt(sizes.num_shared, sizes.batch_size)
    plan = plan_decode(method_of(mode, crossover), tree, sizes.unique_seq_len, sizes.num_unique)
    return replace(plan, own=_with_keys(plan.own), shared=_with_keys(plan.shared))


def _with_keys(segments: list[Segment]) -> list[Segment]:
    return [segment for segment in segments if segment.k_lens.any()]


def choice_of(segments: list[Segment]) -> str:
    """What a mode that chooses has chosen: ``shared`` where a row of keys is read for several queries."""
    return "shared" if any((np.diff(segment.q_offsets) > 1).any() for segment in segments) else "unshared"


def num_slots(sizes: Sizes, keeps: Keeps) -> int:
    """Slots of the arena, without a plan: that of sizes which do not fit would not fit either."""
    if keeps is Keeps.HISTORIES:
        return sizes.batch_size * (sizes.num_shared + sizes.num_unique)
    return sizes.num_shared + sizes.batch_size * sizes.num_unique


@dataclass(frozen=True)
class Keys:
    """An arena's keys and values, ``(S, Hkv, D)``, and the segments that read them."""

    plan: DecodePlan
    k_SHD: torch.Tensor
    v_SHD: torch.Tensor


class DecodeWorkload:
    """Random numbers, the same in every mode. Arenas are made when they are first asked for."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype, seed: int):
        self.sizes, self.device, self.dtype, self._seed = sizes, device, dtype, seed
        self.scale = sizes.head_dim**-0.5
        self.q_BHD = self.random(sizes.batch_size, sizes.num_heads, sizes.head_dim)
        self._caches: dict[Keeps, KVCache] = {}

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return _normal(shape, self._generator(), dtype or self.dtype)

    def keys(self, mode: str) -> Keys:
        keeps, plan = method_of(mode).keeps, plan_of(self.sizes, mode)
        if keeps not in self._caches:
            self._caches[keeps] = self._filled_cache(plan)
        return Keys(plan, *self._caches[keeps].layer(0))

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self._seed)

    def _filled_cache(self, plan: DecodePlan) -> KVCache:
        """Filled as the engine does it: the prompt where its node lies, copies of it where the method keeps them."""
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
        return cache


def _normal(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)
