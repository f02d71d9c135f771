"""Decode steps as CUDA graphs.

A graph is captured for a *bucket* of batch sizes, a layout of the attention's items
(``kernels/gpu/attention_items.py``) and a placement in memory. What changes from step to step (tokens, positions,
slots, and the items, which hold every start and length) is written into tensors that the graph reads, so one capture
serves any lengths. Rows that fill up a bucket belong to nobody: they see no key and write to the cache's scratch slot.

Shapes: R sequences, B rows of a bucket, N items.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch

from engine.cuda_graphs import capture
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.kv_cache import KVCache
from engine.model import Step, Transformer
from kernels import AttentionPlan, Backend, Segment

# Steps of a kind that run before it is captured: a kind that does not come again is not worth a capture.
_STEPS_BEFORE = 2
_MAX_GRAPHS = 64


def bucket_of(num_rows: int) -> int:
    """The next larger batch size of which there are four to an octave: a fifth of the rows at most are empty."""
    step = 1 << max(0, num_rows.bit_length() - 3)
    return -(-num_rows // step) * step


def check_capturable(group: TPGroup, attention_backend: str | None) -> None:
    """Raises InputError where decode steps cannot be captured."""
    if group.device.type != "cuda":
        raise InputError(f"CUDA graphs were asked for on {group.device.type}; accepted: on CUDA; leave them out")
    if not group.is_capturable:
        raise InputError(
            f"CUDA graphs were asked for on {group.size} ranks that gloo connects, which waits for the device; "
            "accepted: one rank, or a GPU for each; leave them out"
        )
    if attention_backend not in (None, Backend.TRITON):
        raise InputError(
            f"CUDA graphs were asked for with attention backend {str(attention_backend)!r}; accepted: none, or "
            f"{str(Backend.TRITON)!r}, whose tables have fixed places; leave one of them out"
        )


@dataclass
class _Graph:
    """A kind of step: its input tensors, and once it was captured, how it runs."""

    tokens_B: torch.Tensor  # int64
    positions_slots_2B: torch.Tensor  # int64
    items: torch.Tensor  # (N, columns) int32
    step: Step
    plan: AttentionPlan
    num_steps: int = 0  # that have run
    replay: object = None
    hidden_BI: torch.Tensor | None = None


class DecodeGraphs:
    """The graphs of one model, made as steps come, the least recently used ones dropped."""

    def __init__(self, model: Transformer):
        self._model = model
        self._device = model.embedding.weight.device
        self._graphs: OrderedDict[object, _Graph] = OrderedDict()
        self._pool: object = None
        self._memory: tuple[object, ...] = ()

    def run(
        self,
        tokens_R: torch.Tensor,
        positions_B: np.ndarray,
        slots_B: np.ndarray,
        segments: list[Segment],
        cache: KVCache | None,
    ) -> torch.Tensor:
        """``(R, hidden)`` of one new token for each sequence. The other rows of the bucket are at the end of
        ``positions_B``, ``slots_B`` and the segments."""
        self._forget_graphs_of_other_memory(cache)
        layout, items = self._lay_out(segments)
        graph = self._graph((len(positions_B), layout, cache is None), items, layout, cache)
        num_rows = len(tokens_R)
        graph.tokens_B[:num_rows] = tokens_R
        graph.positions_slots_2B.copy_(torch.from_numpy(np.stack([positions_B, slots_B])), non_blocking=True)
        graph.items.copy_(torch.from_numpy(items), non_blocking=True)
        graph.num_steps += 1
        if graph.replay is None and graph.num_steps <= _STEPS_BEFORE:
            return self._forward(graph, cache)[:num_rows]
        if graph.replay is None:
            graph.replay, graph.hidden_BI, self._pool = capture(
                lambda: self._forward(graph, cache), self._device, self._pool
            )
        graph.replay()
        return graph.hidden_BI[:num_rows].clone()  # the next graph may use the memory

    def _forward(self, graph: _Graph, cache: KVCache | None) -> torch.Tensor:
        return self._model(graph.step, graph.plan, cache)

    def _lay_out(self, segments: list[Segment]) -> tuple[object, np.ndarray]:
        from kernels.gpu.attention import num_processors  # here, as Triton takes long to import
        from kernels.gpu.attention_items import HeadShape, Item, lay_out

        if not segments:
            return None, np.empty((0, Item.COUNT), dtype=np.int32)
        attention, dtype = self._model.layers[0].attention, self._model.embedding.weight.dtype
        heads = HeadShape(attention.num_heads, attention.num_kv_heads, attention.head_dim, dtype)
        return lay_out(segments, heads, num_processors(self._device), fixed=True)

    def _graph(self, kind: object, items: np.ndarray, layout: object, cache: KVCache | None) -> _Graph:
        if kind in self._graphs:
            self._graphs.move_to_end(kind)
            return self._graphs[kind]
        from kernels.gpu.attention import LaidOut

        num_rows = kind[0]
        tokens = torch.zeros(num_rows, dtype=torch.int64, device=self._device)
        numbers = torch.zeros(2, num_rows, dtype=torch.int64, device=self._device)
        table = torch.zeros(items.shape, dtype=torch.int32, device=self._device)
        step = Step(tokens, numbers[0], None if cache is None else numbers[1], None, self._model.operations_backend)
        plan = AttentionPlan([] if layout is None else [(Backend.TRITON, LaidOut(layout, table))])
        self._graphs[kind] = _Graph(tokens, numbers, table, step, plan)
        if len(self._graphs) > _MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return self._graphs[kind]

    def _forget_graphs_of_other_memory(self, cache: KVCache | None) -> None:
        """Graphs hold addresses. Of what they read and do not own, the arenas and the rotary table can move."""
        memory = (self._model.rotary_table, None if cache is None else cache.placement)
        if not all(now is then for now, then in zip_longest(memory, self._memory)):
            self._graphs.clear()
            self._pool = None  # it goes with its graphs
            self._memory = memory
