"""The least time a decode step can take on this machine: its measured ceilings against the work that a step must do.

The model is that of Williams, Waterman and Patterson (2009): a step is bound by the bytes it must move or by the
arithmetic it must do, whichever takes longer alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.attention import AttentionMethod
from engine.attention.pass_plan import count_keys, plan_pass
from engine.bench.streamed_buffer import StreamedBuffer
from engine.bench.timing import Timer
from engine.config import ModelConfig
from engine.prefix_tree import PrefixTree
from engine.sharding import local_kv_heads
from kernels.window import within_window


@dataclass(frozen=True)
class Ceilings:
    """What one rank of this machine does at most, as measured.

    ``rows_tflops`` is the rate of ``(rows, K) x (K, N)``, the shape of a decode step's linear layers. On a CPU it can
    be well below ``matmul_tflops``, the rate of large square products.
    """

    read_gbs: float  # 10^9 bytes/s
    matmul_tflops: float
    rows_tflops: float
    rows: int


@dataclass(frozen=True)
class Cost:
    """The work of one decode step on one rank."""

    bytes: int  # read from memory
    linear_flops: int  # of the linear layers and the output head: products of ``batch`` rows
    attention_flops: int

    @property
    def flops(self) -> int:
        return self.linear_flops + self.attention_flops


def decode_step_cost(
    method: AttentionMethod, tree: PrefixTree, unique_len: float, config: ModelConfig, world_size: int = 1
) -> Cost:
    """The work of one decode step of a Llama-family model with a gated MLP, for one of ``world_size`` ranks.

    Each sequence of ``tree`` attends to the keys of the nodes above it and to ``unique_len`` keys of its own (the mean
    over the steps that were timed, so it may be fractional), whatever suffix the tree gives it.

    - Weights are read once a step, whatever the batch; each multiplies every row: ``2 * batch`` FLOPs a weight.
    - Keys and values: those that the method's segments name, once for all queries of a row. So ``hydragen`` reads the
      shared ones once for the whole batch, ``hydragen_noshared`` each sequence's own copy of its whole history.
      A sliding window leaves the keys before it out.
    - Attention is two products per query head and key, ``4 * head_dim`` FLOPs, however the keys were read.

    Left out, as small beside these: activations, the cache's new rows, norms, embedding rows, and communication.
    """
    keys_read, keys_attended = _count_keys(method, tree, unique_len, config.sliding_window)
    local_heads = config.num_heads // world_size
    kv_heads = local_kv_heads(config.num_kv_heads, 0, world_size)[1]
    hidden, head_dim, num_layers = config.hidden_size, config.head_dim, config.num_layers
    attention_weights = hidden * head_dim * (2 * local_heads + 2 * kv_heads)  # q, o and k, v
    mlp_weights = 3 * hidden * (config.intermediate_size // world_size)  # gate, up, down
    head_weights = hidden * -(-config.vocab_size // world_size)
    weights = num_layers * (attention_weights + mlp_weights) + head_weights

    return Cost(
        bytes=round(config.dtype.itemsize * (weights + num_layers * 2 * kv_heads * head_dim * keys_read)),
        linear_flops=2 * tree.num_sequences * weights,
        attention_flops=round(num_layers * 4 * local_heads * head_dim * keys_attended),
    )


def _count_keys(
    method: AttentionMethod, tree: PrefixTree, unique_len: float, window: int | None
) -> tuple[float, float]:
    """``(keys read, pairs of query and key)`` of a decode step, as the method plans it; a fraction is interpolated."""
    whole = int(unique_len)
    fewer, more = (np.array(_planned_keys(method, tree, length, window)) for length in (whole, whole + 1))
    keys_read, keys_attended = (fewer + (unique_len - whole) * (more - fewer)).tolist()
    return keys_read, keys_attended


def _planned_keys(
    method: AttentionMethod, tree: PrefixTree, unique_len: int, window: int | None
) -> tuple[int, int]:
    segments = plan_pass(method, tree, unique_len, max(unique_len, 1)).segments
    if window is not None:
        q_positions = tree.table.suffix_position + unique_len - 1
        segments = [part for segment in segments for part in within_window(segment, q_positions, window)]
    return count_keys(segments)


def predict_ms(cost: Cost, ceilings: Ceilings) -> float:
    """The least time, in ms, of a step of this cost: of moving its bytes or of its arithmetic, whichever is longer.

    Linear layers are held to the rate measured at their number of rows, attention to that of large products: many
    queries meet many keys in a shared prefix; over a sequence's own keys the bytes decide anyway.
    """
    move_ms = cost.bytes / (ceilings.read_gbs * 1e6)
    linear_ms = cost.linear_flops / (ceilings.rows_tflops * 1e9)
    attention_ms = cost.attention_flops / (ceilings.matmul_tflops * 1e9)
    return max(move_ms, linear_ms + attention_ms)


def measure_ceilings(device: torch.device, dtype: torch.dtype, rows: int = 64, seconds: float = 1.0) -> Ceilings:
    """Measures this rank's ceilings in about ``seconds``; ``rows`` is the batch of the decode step they are meant for.

    Every rank should measure at the same time: ranks on one machine share its memory.
    """
    budget_s = seconds / 3
    return Ceilings(
        read_gbs=read_gbs(device, budget_s),
        matmul_tflops=_matmul_tflops(None, device, dtype, budget_s),
        rows_tflops=_matmul_tflops(rows, device, dtype, budget_s),
        rows=rows,
    )


def read_gbs(device: torch.device, budget_s: float) -> float:
    """10^9 bytes/s: the best rate of a reduction over a buffer several times the size of any cache."""
    buffer = StreamedBuffer(1 << (30 if device.type == "cuda" else 28), device)
    return buffer.num_bytes / (_best_ms(buffer.read, device, budget_s) * 1e6)


def _matmul_tflops(rows: int | None, device: torch.device, dtype: torch.dtype, budget_s: float) -> float:
    """The best rate of ``(rows, n) x (n, n)`` over growing n; of square products when ``rows`` is None.

    Sizes start small and stop growing once a call outlasts the budget: without bfloat16 instructions a product in
    bfloat16 can be hundreds of times slower than in float32, and at the full size it would take a minute.
    """
    best, n, largest = 0.0, 128, 8192 if device.type == "cuda" else 2048
    while n <= largest:
        x = torch.randn(rows or n, n, device=device).to(dtype)
        weight = torch.randn(n, n, device=device).to(dtype)
        best_ms = _best_ms(lambda x=x, weight=weight: x @ weight.T, device, budget_s / 5)
        best = max(best, 2 * x.shape[0] * n * n / (best_ms * 1e9))
        growth = 4 if rows else 8
        if best_ms * growth > budget_s * 1e3:
            break
        n *= 2
    return best


def _best_ms(fn: Callable[[], Any], device: torch.device, budget_s: float) -> float:
    """The shortest time of one call, out of as many as ``budget_s`` allows after a first that is not counted."""
    calls = 20 if device.type == "cuda" else 1  # launched together, so that the time is the device's, not the launch's
    with Timer(device) as timer:
        fn()
    spent_ms, best = timer.ms, float("inf")
    while best == float("inf") or spent_ms < budget_s * 1e3:
        with Timer(device) as timer:
            for _ in range(calls):
                fn()
        spent_ms += timer.ms
        best = min(best, timer.ms / calls)
    return best
