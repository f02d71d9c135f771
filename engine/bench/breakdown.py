"""Where a decode step's time goes: each mode's step beside the operations that it cannot do without.

Shapes: B sequences, S shared tokens, Hkv KV heads, G query heads of a KV head, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from engine.bench.environment import describe_environment
from engine.bench.modes import ModelOptions
from engine.bench.results import Cell, CellResult, read_cell
from engine.bench.roofline import measure_ceilings
from engine.bench.synth import Sweep, run_sweep
from engine.bench.timing import best_of
from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.files import write_whole
from engine.loader import load_model
from engine.model import Transformer
from kernels import Segment
from kernels.attention import PlannedSegment
from kernels.linear import linear

_REPEATS = 20


@dataclass(frozen=True)
class Breakdown:
    """Times in ms of one decode step at one batch size and shared length; None where a mode has no time.

    ``alone`` is the best of 20 calls on warm, contiguous data.
    """

    batch_size: int
    num_shared: int
    num_unique: int
    matmul_alone_ms: float
    prefix_alone_ms: float
    noattention_ms: float | None
    hydragen_ms: float | None
    noshared_ms: float | None
    hf_ms: float | None
    read_gbs: float  # what this machine reads at most, measured in this run
    kv_bytes: int  # keys and values that the baseline reads in a step

    @property
    def noattention_ratio(self) -> float | None:
        """A step without attention over its matrix products alone."""
        return _over(self.noattention_ms, self.matmul_alone_ms)

    @property
    def attention_ratio(self) -> float | None:
        """What attention adds to a step over the prefix calls alone."""
        return _over(_less(self.hydragen_ms, self.noattention_ms), self.prefix_alone_ms)

    @property
    def hf_ratio(self) -> float | None:
        """How many times faster hydragen is than transformers."""
        return _over(self.hf_ms, self.hydragen_ms)

    @property
    def noshared_gbs(self) -> float | None:
        """The rate at which the baseline's attention reads keys and values."""
        attention_ms = _less(self.noshared_ms, self.noattention_ms)
        return None if not attention_ms else self.kv_bytes / (attention_ms * 1e6)


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def run_breakdown(
    outdir: Path,
    batch_size: int,
    shared_lens: Sequence[int],
    num_unique: int,
    model: ModelOptions,
    modes: Sequence[str],
    num_iters: int,
    group: TPGroup,
    console: Console,
) -> list[Breakdown]:
    """Sweeps the modes into ``outdir``, measures the operations alone, and writes ``outdir/breakdown.yaml``."""
    if group.size > 1:
        raise InputError(f"a step is taken apart in one process, not in {group.size}; start it with python")
    for mode in modes:
        cells = tuple(Cell(mode, batch_size, shared, num_unique) for shared in shared_lens)
        run_sweep(Sweep(outdir, mode, cells, model, num_iters, 1, calc_prefill=False), group, console)
    console.print("Measuring the operations alone ...")
    loaded = load_model(model.name, group, load_format=model.load_format, dtype=model.dtype, seed=model.seed)
    device, config = group.device, loaded.config
    matmul_ms = matmul_alone_ms(loaded.model, batch_size, device)
    read_gbs = measure_ceilings(device, config.dtype, rows=batch_size).read_gbs
    rows = []
    for shared in shared_lens:
        step_ms = {mode: _step_ms(outdir, Cell(mode, batch_size, shared, num_unique)) for mode in modes}
        rows.append(
            Breakdown(
                batch_size=batch_size,
                num_shared=shared,
                num_unique=num_unique,
                matmul_alone_ms=matmul_ms,
                prefix_alone_ms=prefix_alone_ms(loaded.model, batch_size, shared, device),
                noattention_ms=step_ms.get("noattention"),
                hydragen_ms=step_ms.get("hydragen"),
                noshared_ms=step_ms.get("hydragen_noshared"),
                hf_ms=step_ms.get("hf"),
                read_gbs=read_gbs,
                kv_bytes=_kv_bytes(config, batch_size, shared + num_unique // 2),
            )
        )
    described = {
        "environment": describe_environment(device, config.dtype, group.size),
        "steps": [asdict(row) for row in rows],
    }
    write_whole(outdir / "breakdown.yaml", yaml.safe_dump(described, sort_keys=False).encode())
    return rows


def matmul_alone_ms(model: Transformer, batch_size: int, device: torch.device) -> float:
    """A step's matrix products: those of one layer, times the layers, and the output head's."""
    layer = model.layers[0]
    projections = [layer.attention.qkv_proj, layer.attention.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj]

    def best(weights: list[torch.Tensor]) -> float:
        rows = [torch.randn(batch_size, w.shape[1], device=device).to(w.dtype) for w in weights]
        times = best_of(
            lambda: [linear(x, w) for x, w in zip(rows, weights, strict=True)], _REPEATS, 2, device
        )
        return min(times)

    return len(model.layers) * best([p.weight for p in projections]) + best([model.head.weight])


def prefix_alone_ms(model: Transformer, batch_size: int, num_shared: int, device: torch.device) -> float:
    """A step's attention of all queries to the shared keys: one call, times the layers."""
    attention = model.layers[0].attention
    heads, D, dtype = attention.num_kv_heads, attention.head_dim, model.config.dtype
    num_queries = batch_size * attention.num_heads // heads  # a group's heads are so many more queries
    q_HTD = torch.randn(heads, num_queries, D, device=device).to(dtype)
    k_HSD, v_HSD = torch.randn(2, heads, num_shared, D, device=device).to(dtype)
    segment = Segment(np.array([0, num_queries]), np.array([0]), np.array([num_shared]))
    planned = PlannedSegment(segment, device, dtype)
    q, k, v = (x.transpose(0, 1) for x in (q_HTD, k_HSD, v_HSD))
    return len(model.layers) * min(best_of(lambda: planned.run(q, k, v, attention.scale), _REPEATS, 2, device))


def print_breakdown(rows: Sequence[Breakdown], console: Console) -> None:
    """A table of the times, and of what they are held against."""
    table = Table(title="One decode step, ms", box=box.SIMPLE)
    for column in (
        "batch", "shared", "matmul\nalone", "noatt-\nention", "noattention\n/ matmul", "prefix\nalone", "hydragen",
        "added\n/ prefix", "noshared", "its KV\nGB/s", "of read\nlimit", "hf", "hf /\nhydragen",
    ):  # fmt: skip
        table.add_column(column, justify="right")

    def show(value: float | None, spec: str) -> str:
        return "-" if value is None else format(value, spec)

    for row in rows:
        table.add_row(
            str(row.batch_size),
            str(row.num_shared),
            show(row.matmul_alone_ms, ".1f"),
            show(row.noattention_ms, ".1f"),
            show(row.noattention_ratio, ".2f"),
            show(row.prefix_alone_ms, ".1f"),
            show(row.hydragen_ms, ".1f"),
            show(row.attention_ratio, ".2f"),
            show(row.noshared_ms, ".1f"),
            show(row.noshared_gbs, ".1f"),
            show(_over(row.noshared_gbs, row.read_gbs), ".0%"),
            show(row.hf_ms, ".1f"),
            show(row.hf_ratio, ".1f"),
        )
    console.print(table)
    console.print(f"This machine reads {rows[0].read_gbs:.1f} GB/s at most, as measured in this run.")


def _step_ms(outdir: Path, cell: Cell) -> float | None:
    result: CellResult = read_cell(cell.path(outdir))
    return result.decode_step_ms


def _kv_bytes(config: ModelConfig, batch_size: int, history: int) -> int:
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * batch_size * history * config.dtype.itemsize
