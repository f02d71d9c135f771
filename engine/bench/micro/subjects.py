"""What is timed at one size: a row of the results, and its operation."""

from dataclasses import asdict, dataclass
from functools import cache, partial

import torch

from engine.attention.crossover import Crossover
from engine.bench.micro.decode_operations import all_operations, whole_attention
from engine.bench.micro.micro_results import OPERATIONS_MODE, PREFILL_MODE, Row, Sizes
from engine.bench.micro.micro_settings import MicroSweep
from engine.bench.micro.operation import Operation
from engine.bench.micro.prefill_operations import prefill_operations
from engine.calibration import Setting, find_crossover
from engine.distributed import TPGroup
from kernels import Backend


@dataclass(frozen=True)
class Subject:
    """One row, and the operation that it times."""

    row: Row
    operation: Operation
    backend: Backend | None


def subjects_of(sweep: MicroSweep, sizes: Sizes, device: torch.device) -> list[Subject]:
    """What is timed at these sizes."""

    def subject(timed: Operation, backend: Backend | None, **names: str) -> Subject:
        return Subject(Row(**asdict(sizes), backend=backend or "", **names), timed, backend)

    heads = (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim)
    crossover = partial(_crossover, device, sweep.dtype, heads, sweep.backend)
    if sweep.modes == (PREFILL_MODE,):
        return [
            subject(one, sweep.backend, mode=PREFILL_MODE, method=one.method.text, operation=one.name)
            for one in prefill_operations(sweep.methods)
        ]
    if sweep.modes == (OPERATIONS_MODE,):
        return [
            subject(operation, backend, mode=OPERATIONS_MODE, operation=operation.name)
            for operation in all_operations(crossover)
            if operation.runs(sizes)
            for backend in operation.backends(device, sweep.dtype)
        ]
    return [subject(whole_attention(mode, crossover), sweep.backend, mode=mode) for mode in sweep.modes]


@cache
def _crossover(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], backend: Backend | None
) -> Crossover:
    return find_crossover(TPGroup(device=device), Setting.of(device, dtype, *heads, backend), dtype)
