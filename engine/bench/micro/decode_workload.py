"""What the operations of a decode step work on: keys and values where the engine would have them, and queries.

Shapes: B sequences, S slots of an arena, Hq query heads, Hkv KV heads, D head dimension.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from engine.attention import AttentionMethod, Auto, Keeps, get_method
from engine.attention.crossover import ALWAYS, Crossover
from engine.attention.pass_plan import PassPlan, one_prompt, plan_pass
from engine.bench.micro.micro_results import Sizes
from engine.bench.micro.workload import Workload
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
def plan_of(sizes: Sizes, mode: str, crossover: Crossover = ALWAYS) -> PassPlan:
    """The segments of one decode step. Those without keys are left out: nothing is to be timed of them."""
    tree = one_prompt(sizes.num_shared, sizes.batch_size)
    plan = plan_pass(method_of(mode, crossover), tree, sizes.unique_seq_len, sizes.num_unique)
    return replace(plan, own=_with_keys(plan.own), shared=_with_keys(plan.shared))


def _with_keys(segments: list[Segment]) -> list[Segment]:
    return [segment for segment in segments if segment.k_lens.any()]


def choice_of(segments: list[Segment]) -> str:
    """What a mode that chooses has chosen: ``shared`` where a row of keys is read for several queries."""
    return "shared" if any((np.diff(segment.q_offsets) > 1).any() for segment in segments) else "unshared"


@dataclass(frozen=True)
class Keys:
    """An arena's keys and values, ``(S, Hkv, D)``, and the segments that read them."""

    plan: PassPlan
    k_SHD: torch.Tensor
    v_SHD: torch.Tensor


class DecodeWorkload(Workload):
    """Queries of one new token of each sequence, and arenas, which are made when they are first asked for."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype, seed: int):
        super().__init__(sizes, device, dtype, seed)
        self.q_BHD = self.random(sizes.batch_size, sizes.num_heads, sizes.head_dim)
        self._arenas: dict[Keeps, tuple[torch.Tensor, torch.Tensor]] = {}

    def keys(self, mode: str) -> Keys:
        keeps, plan = method_of(mode).keeps, plan_of(self.sizes, mode)
        if keeps not in self._arenas:
            self._arenas[keeps] = self.filled_arenas(plan)
        return Keys(plan, *self._arenas[keeps])
