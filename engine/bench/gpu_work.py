"""What the measuring sections of a GPU check do, each in a process of its own, which leaves its results in a folder.

``python -m engine.bench.gpu_work SECTION FOLDER DEVICE SIZE``; ``engine.bench.gpu_check`` starts it and reads them.
"""

import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine.attention import METHODS
from engine.bench.environment import Execution, describe_environment
from engine.bench.micro.micro_results import PREFILL_MODE, Sizes
from engine.bench.micro.micro_settings import MicroSweep, parse_methods
from engine.bench.micro.micro_sweep import run_microbenchmark
from engine.bench.modes import ModelOptions, check_mode
from engine.bench.needles.run import run_needles
from engine.bench.needles.settings import SHIPPED_MODEL, Settings
from engine.bench.results import Cell
from engine.bench.roofline import measure_ceilings
from engine.bench.synth import Sweep, make_grid, run_sweep
from engine.cli import make_console
from engine.distributed import TPGroup, init_group
from engine.engine import Engine
from engine.files import write_whole
from engine.loader import load_model
from engine.prefill import PrefillMethod
from engine.sampling import SamplingParams
from kernels import Backend

RESULTS = "results.json"
# All methods whose decode steps can be captured.
_MODES = tuple(name for name, method in METHODS.items() if not method.moves)
_GRAPHS = Execution(attention_backend="triton", operations_backend="triton", cuda_graphs=True)
_DTYPE = "bfloat16"
NEEDLE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Grid:
    """Modes and sizes of one model, which has random weights, and how the engine runs."""

    model: str
    modes: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    num_shared: tuple[int, ...]
    num_unique: tuple[int, ...]
    execution: Execution = Execution()

    def cells(self, mode: str) -> tuple[Cell, ...]:
        return make_grid(mode, self.batch_sizes, self.num_shared, self.num_unique)


@dataclass(frozen=True)
class MicroGrid:
    """Modes and sizes of the microbenchmark, timed in this order until the time is over."""

    modes: tuple[str, ...]
    sizes: tuple[Sizes, ...]
    num_needed: int  # of the sizes, the first ones
    seconds: float
    num_iters: int
    backend: Backend | None = None  # of attention; None: the best there is
    methods: tuple[PrefillMethod, ...] = ()  # of mode prefill

    @classmethod
    def of(
        cls,
        modes: tuple[str, ...],
        lengths: Sequence[tuple[int, int, int]],
        heads: tuple[int, int, int],
        num_needed: int,
        seconds: float,
        num_iters: int,
        backend: Backend | None = None,
        prefill: str | None = None,
    ) -> "MicroGrid":
        """``lengths`` are batch sizes, shared and unique keys; ``heads`` query and KV heads and their dimension;
        ``prefill`` the methods of mode ``prefill``."""
        sizes = tuple(Sizes(b, s, u, u, *heads) for b, s, u in lengths)
        return cls(modes, sizes, num_needed, seconds, num_iters, backend, parse_methods(prefill, modes))


# Of the Hydragen paper's figures 5 and 8: batch sizes and shared keys.
_PAPER = ((512, 1024), (1024, 2048), (2048, 4096), (4096, 8192))
_COARSE = tuple(range(0, 513, 128))
# Unique keys from coarse to fine steps.
_UNIQUE = (*_COARSE, *(u for step in (64, 32, 16) for u in range(step, 513, 2 * step)))


@dataclass(frozen=True)
class Size:
    """How much a check does."""

    ceiling_rows: tuple[int, ...]
    ceiling_seconds: float  # for each number of rows
    micro: dict[str, MicroGrid]  # by section
    sweeps: dict[str, Grid]  # likewise
    num_iters: int
    rank_models: tuple[tuple[str, str], ...]  # (preset, dtype) that two ranks run
    num_questions: tuple[int, ...]  # about a document, of the model that ships
    document_lengths: tuple[int, ...]  # in characters


SIZES = {
    "full": Size(
        ceiling_rows=(16, 64, 256),
        ceiling_seconds=1.5,
        micro={
            "attention": MicroGrid.of(
                ("base", "hydragen", "auto"),
                [(b, s, u) for u in _UNIQUE for b, s in _PAPER],
                (8, 1, 128),
                num_needed=len(_COARSE) * len(_PAPER),
                seconds=50,
                num_iters=20,
            ),
            "operations": MicroGrid.of(
                ("operations",), [(4096, 8192, 64), (64, 4096, 64), (1, 16, 2**17)], (8, 1, 128), 3, 33, 30
            ),
            "crossover": MicroGrid.of(
                ("base", "hydragen", "auto"),
                [(b, s, 64) for b in (1, 4, 16, 64, 256) for s in (16, 128, 1024, 4096, 16384)],
                (8, 1, 128),
                num_needed=25,
                seconds=33,
                num_iters=30,
                backend=Backend.TRITON,  # which takes keys that are not shared in the same launch
            ),
            "sparse": MicroGrid.of(
                (PREFILL_MODE,),
                [*((1, 0, 2**n) for n in (13, 17, 10, 11, 12, 14, 15, 16)), (1, 2**16, 2**11), (8, 2**14, 2**11)],
                (32, 8, 128),
                num_needed=2,
                seconds=24,
                num_iters=10,
                # Of 131,072 random keys each sparse one looks at about a tenth.
                prefill="dense,a_shape:n_init=128:n_local=6600,vertical_slash:num_vertical=1000:num_slash=200,"
                "block_sparse:num_blocks=100",
            ),
        },
        sweeps={
            "sweep-125m": Grid("llama-125m", (*_MODES, "hf"), (16, 256), (1024, 4096), (64,)),
            "graphs-125m": Grid("llama-125m", _MODES, (16, 256), (1024, 4096), (64,), _GRAPHS),
            "sweep-8b": Grid("meta-llama/Llama-3.1-8B", _MODES, (32, 128), (4096,), (32,)),
            "graphs-8b": Grid("meta-llama/Llama-3.1-8B", _MODES, (32, 128), (4096,), (32,), _GRAPHS),
        },
        num_iters=3,
        # In float32 CUDA has kernels that nobody has measured: a small model is enough.
        rank_models=(("tiny", "float32"), ("demo", "bfloat16")),
        num_questions=(64, 256, 1024),
        document_lengths=(20_000, 80_000),
    ),
    "tiny": Size(
        ceiling_rows=(4,),
        ceiling_seconds=0.03,
        micro={
            "attention": MicroGrid.of(("base", "hydragen", "auto"), [(2, 8, u) for u in (0, 4)], (2, 1, 8), 2, 60, 2),
            "operations": MicroGrid.of(("operations",), [(2, 8, 4)], (2, 1, 8), 1, 60, 2),
            "crossover": MicroGrid.of(("base", "hydragen", "auto"), [(2, 16, 4)], (2, 1, 8), 1, 60, 2),
            "sparse": MicroGrid.of(
                (PREFILL_MODE,), [(1, 8, 200)], (2, 1, 8), 1, 60, 2, prefill="dense,a_shape:n_init=1:n_local=1"
            ),
        },
        sweeps={
            "sweep-125m": Grid("tiny", ("noattention", "hydragen", "auto"), (2,), (24,), (3,)),
            "graphs-125m": Grid("tiny", ("hydragen",), (2,), (24,), (3,), Execution(operations_backend="aten")),
            "sweep-8b": Grid("tiny", ("hydragen_noshared",), (2,), (24,), (3,)),
            "graphs-8b": Grid("tiny", ("hydragen",), (2,), (24,), (3,), Execution("aten")),
        },
        num_iters=1,
        rank_models=(("tiny", "float32"), ("tiny", "bfloat16")),
        num_questions=(16,),
        document_lengths=(1500,),
    ),
}


def measure_machine(folder: Path, group: TPGroup, size: Size) -> None:
    """What the machine is, and its ceilings in bfloat16 for several numbers of rows."""
    dtype = getattr(torch, _DTYPE)
    ceilings = [measure_ceilings(group.device, dtype, rows, size.ceiling_seconds) for rows in size.ceiling_rows]
    environment = describe_environment(group.device, dtype, group.size)
    _write(folder, {"environment": environment, "ceilings": [asdict(c) for c in ceilings]})


def sweep(folder: Path, group: TPGroup, size: Size, grid: Grid) -> None:
    """Times every cell of a grid; each is a file as soon as it is done. A mode that fails leaves the others alone."""
    model = ModelOptions(grid.model, load_format="dummy", dtype=_DTYPE)
    failed, console = [], make_console()
    for mode in grid.modes:
        try:
            check_mode(mode, model, group.size, None, execution=grid.execution)
            cells = grid.cells(mode)
            run_sweep(Sweep(folder, mode, cells, model, size.num_iters, 1, True, None, grid.execution), group, console)
        except Exception:
            traceback.print_exc()
            failed.append(mode)
    if failed:
        sys.exit(f"modes that failed: {', '.join(failed)}")


def time_attention(folder: Path, group: TPGroup, grid: MicroGrid) -> None:
    """The microbenchmark; each size's rows are files as soon as they are done."""
    sweep = MicroSweep(
        folder, grid.modes, grid.sizes, getattr(torch, _DTYPE), grid.backend, num_iters=grid.num_iters, num_warmup=3,
        seconds=grid.seconds, methods=grid.methods,
    )  # fmt: skip
    run_microbenchmark(sweep, group, make_console())


# Shared prefixes at two depths, an empty suffix, equal prompts, and one that shares nothing.
_ROOT = list(range(7, 60))
_PROMPTS = [[*_ROOT, 1, 2, 3], _ROOT, [*_ROOT, 1, 2, 4, 4], [9, 8], [*_ROOT, 5], [*_ROOT, 5], list(range(300, 330))]


def compare_ranks(folder: Path, group: TPGroup, size: Size) -> None:
    """What all ranks generate together, beside the logits of rank 0 alone for the same tokens."""
    comparisons = []
    for preset, dtype in size.rank_models:
        together = _engine(preset, dtype, group)
        alone = _engine(preset, dtype, TPGroup(device=group.device)) if group.rank == 0 else None
        for method in ("hydragen", "hydragen_noshared"):
            tokens, logits = _generate(together, method)
            agree = all(theirs == tokens for theirs in group.gather_objects(tokens))
            if alone is not None:
                _, expected = _generate(alone, method, forced=tokens)
                about = {"model": preset, "dtype": dtype, "method": method, "num_ranks": group.size}
                comparisons.append(about | {"ranks_agree": agree} | _difference(logits, expected))
    if group.rank == 0:
        _write(folder, {"comparisons": comparisons})
    group.barrier()


def _engine(preset: str, dtype: str, group: TPGroup) -> Engine:
    return Engine(load_model(preset, group, load_format="dummy", dtype=dtype).model)


def _generate(
    engine: Engine, method: str, forced: list[list[int]] | None = None
) -> tuple[list[list[int]], torch.Tensor]:
    """Each prompt's tokens, and the logits ``(tokens, vocabulary)`` that they were chosen from."""
    params = SamplingParams(temperature=0, max_tokens=8)
    results = engine.generate(_PROMPTS, params, attention=method, forced_tokens=forced, return_logits=True)
    return [r.token_ids for (r,) in results], torch.stack([row for (r,) in results for row in r.logits])


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> dict[str, float | int]:
    """``largest_difference`` is of the largest logit. Where it is small, a token that differs was a near tie."""
    return {
        "largest_difference": ((logits - expected).abs().max() / expected.abs().max()).item(),
        "num_tokens": len(logits),
        "num_tokens_differ": int((logits.argmax(-1) != expected.argmax(-1)).sum()),
    }


def ask_needles(folder: Path, group: TPGroup, size: Size) -> None:
    """Questions about hidden facts, asked of the model that ships by every method in turns; each is a file."""
    for dtype in NEEDLE_DTYPES:
        settings = Settings(
            outdir=folder,
            save_name=dtype,
            model=ModelOptions(str(SHIPPED_MODEL), dtype=dtype),
            attention=("hydragen", "hydragen_noshared", "noattention"),
            question_counts=size.num_questions,
            document_lengths=size.document_lengths,
            num_few_shot=5,
            num_iters=size.num_iters,
            num_warmup=1,
            measure_first_token=True,
            grid=None,
        )
        run_needles(settings, group, make_console())


def _write(folder: Path, results: dict) -> None:
    write_whole(folder / RESULTS, json.dumps(results).encode())


def main(section: str, folder: str, device: str, size_name: str) -> None:
    size = SIZES[size_name]
    group = init_group(device, timeout_s=120)
    try:
        if section in size.sweeps:
            sweep(Path(folder), group, size, size.sweeps[section])
        elif section in size.micro:
            time_attention(Path(folder), group, size.micro[section])
        else:
            work = {"machine": measure_machine, "ranks": compare_ranks, "needles": ask_needles}[section]
            work(Path(folder), group, size)
    finally:
        group.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
