"""What reading prompts works on: B sequences with as many new tokens each, below a prompt that is in the cache already.

Shapes: T = B x new tokens, S slots of an arena, Hq query heads, Hkv KV heads, D head dimension.
"""

import torch

from engine.attention import Hydragen
from engine.attention.pass_plan import one_prompt, plan_pass
from engine.bench.micro.micro_results import Sizes
from engine.bench.micro.workload import Workload
from engine.prefill.sparse import sparse_rows


class PrefillWorkload(Workload):
    """The new tokens of each sequence are its own keys, as many as are in use."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype, seed: int):
        super().__init__(sizes, device, dtype, seed)
        tree, num_new = one_prompt(sizes.num_shared, sizes.batch_size), sizes.unique_seq_len
        plan = plan_pass(Hydragen(), tree, num_new, sizes.num_unique, num_new)
        self.q_THD = self.random(sizes.batch_size * num_new, sizes.num_heads, sizes.head_dim)
        self.k_SHD, self.v_SHD = self.filled_arenas(plan)
        self.segments = [segment for segment in plan.segments if segment.k_lens.any()]
        self.rows = sparse_rows(plan.tree, plan.placement, plan.runs)
