"""Sparse attention by PyTorch's own operations, for devices and dtypes that no kernel of ours takes: the queries of a
tile against the keys that their mask picks, head by head.

Shapes: T queries, S keys of the arena, H query heads, D head dimension.
"""

import torch

from kernels.sparse.index import SparseIndex
from kernels.sparse.rows import TILE, SparseRows
from kernels.sparse.tasks import Task, make_tasks


class AtenTasks:
    def __init__(self, rows: SparseRows, device: torch.device):
        self._rows, self._device, self._tasks = rows, device, make_tasks(rows)
        self._slots = [torch.from_numpy(rows.slots(row)).to(device) for row in range(rows.num_rows)]

    def run(
        self, q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, index: SparseIndex, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``out (T, H, D)`` and ``lse (T, H)``, float32, or float64 as the queries are."""
        T, H, D = q_THD.shape
        dtype = torch.promote_types(q_THD.dtype, torch.float32)
        out, lse = q_THD.new_empty(T, H, D, dtype=dtype), q_THD.new_empty(T, H, dtype=dtype)
        for task in self._tasks.tolist():
            first, num_queries, row, position, _ = task
            slots = self._slots[row][: position + num_queries]
            mask = _seen(index, task)
            queries = slice(first, first + num_queries)
            # Of the last tile's keys each query sees one more than the one before.
            behind = torch.ones(num_queries, num_queries, dtype=torch.bool, device=self._device).triu(1)
            for head in range(H):
                chosen = slots[mask[head]]
                kv_head = head // (H // k_SHD.shape[1])
                k, v = (x[chosen, kv_head].to(dtype) for x in (k_SHD, v_SHD))
                scores = q_THD[queries, head].to(dtype) @ k.T * scale
                scores[:, len(chosen) - num_queries :].masked_fill_(behind, float("-inf"))
                out[queries, head], lse[queries, head] = scores.softmax(-1) @ v, scores.logsumexp(-1)
        return out, lse


def _seen(index: SparseIndex, task: list[int]) -> torch.Tensor:
    """``(H, keys up to the task's last query)`` bool: those that the task's last query sees."""
    num_keys, row, tile = task[Task.POSITION] + task[Task.NUM_QUERIES], task[Task.ROW], task[Task.POSITION] // TILE
    K = index.distances.shape[2]
    of_tile = torch.zeros(index.num_heads, tile + 1, dtype=torch.bool, device=index.distances.device)
    near = index.distances[row, :, : min(K, tile + 1)].flip(-1)
    of_tile[:, tile + 1 - near.shape[1] :] = near
    of_tile |= (index.dense_from[row] <= tile)[:, None]
    for head, number in enumerate(index.tiles_of_head.tolist()):
        if number >= 0:
            listed = index.tiles[row, number, task[Task.LISTED]]
            of_tile[head, listed[listed <= tile].long()] = True
    seen = of_tile.repeat_interleave(TILE, 1)[:, :num_keys]
    columns = index.columns[row].long()
    in_reach = columns.clamp(max=num_keys)  # one place more, for those that are not there or behind
    return torch.nn.functional.pad(seen, (0, 1)).scatter(1, in_reach, True)[:, :num_keys]
