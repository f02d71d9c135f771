"""What a microbenchmark is asked to do: its modes, methods and sizes, checked before anything is made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from engine.bench.micro.decode_workload import MODES
from engine.bench.micro.micro_results import OPERATIONS_MODE, PREFILL_MODE, Sizes
from engine.bench.ranges import check_combinations
from engine.errors import InputError
from engine.loader import DTYPES
from engine.prefill import MINFERENCE, PREFILL_METHODS, PrefillMethod, parse_prefill
from kernels import Backend, check_backend
from kernels.sparse import available_sparse_backends

# Modes that compare by themselves.
_ALONE = (OPERATIONS_MODE, PREFILL_MODE)
# Prefill methods that are the same for all heads, and so need no model.
METHODS = tuple(name for name in PREFILL_METHODS if name != MINFERENCE)


@dataclass(frozen=True)
class MicroSweep:
    """A grid of sizes, and what is timed at each, turn by turn."""

    outdir: Path
    modes: tuple[str, ...]
    grid: tuple[Sizes, ...]
    dtype: torch.dtype = torch.bfloat16
    backend: Backend | None = None  # of attention; None: the best there is
    seed: int = 0
    num_iters: int | None = None  # None: as many as BUDGET_S allows
    num_warmup: int | None = None
    save: bool = True  # write files, and skip the rows that have one
    verbose: bool = False
    seconds: float | None = None  # after which no further size is begun
    methods: tuple[PrefillMethod, ...] = ()  # of mode prefill


def parse_modes(mode: str, compare: str | None) -> tuple[str, ...]:
    """The mode and those that take turns with it. Raises InputError for one that is not known, or given twice."""
    others = () if compare is None else tuple(name.strip() for name in compare.split(","))
    modes = (mode, *others)
    accepted = (*MODES, *_ALONE) if len(modes) == 1 else tuple(MODES)
    for name in modes:
        if name not in accepted:
            alone = "" if len(modes) == 1 else f" ({' and '.join(_ALONE)} alone: they compare by themselves)"
            raise InputError(
                f"mode {name!r} is not known{' here' if alone else ''}; accepted: {', '.join(accepted)}{alone}"
            )
        if modes.count(name) > 1:
            raise InputError(f"mode {name} was given twice; accepted: each once; leave one out of --compare")
    return modes


def parse_methods(text: str | None, modes: Sequence[str]) -> tuple[PrefillMethod, ...]:
    """The prefill methods that ``text`` names, with commas between them; without one those of mode ``prefill``.

    Raises InputError in other modes, for a method that has not one pattern for all heads or comes twice, and for the
    option ``dense_below``: every size is timed.
    """
    if PREFILL_MODE not in modes:
        if text is not None:
            raise InputError(f"--prefill {text} was given in mode {modes[0]}; accepted: in mode {PREFILL_MODE}")
        return ()
    found: dict[PrefillMethod, PrefillMethod] = {}
    for part in (",".join(METHODS) if text is None else text).split(","):
        method = parse_prefill(part)
        if method.name not in METHODS:
            raise InputError(
                f"prefill {method.text} has a pattern for each head of a model; accepted here: {', '.join(METHODS)}; "
                "scripts/prefill.py times a model"
            )
        if any(option.startswith("dense_below=") for option in method.text.split(":")):
            raise InputError(
                f"prefill {method.text} has the option dense_below; accepted here: a pattern's own, for all sizes are "
                "timed; leave it out"
            )
        # With all options at their usual values a method is the same as without options.
        same = replace(method, text="")
        if same in found:
            raise InputError(
                f"--prefill has {found[same].text} and {method.text}, which are the same; accepted: each once; leave "
                "one out"
            )
        found[same] = method
    return tuple(found.values())


def parse_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not known; accepted: {', '.join(DTYPES)}")
    return DTYPES[name]


def parse_backend(
    name: str | None, modes: Sequence[str], device: torch.device, dtype: torch.dtype
) -> Backend | None:
    """Raises InputError for one that cannot run there, or where ``operations`` tries them all."""
    if name is None:
        return None
    if OPERATIONS_MODE in modes:
        raise InputError(f"--backend {name} was given, but mode {OPERATIONS_MODE} times every backend; leave it out")
    try:
        backend = check_backend(name, device, dtype)
    except ValueError as error:
        raise InputError(str(error)) from None
    sparse = available_sparse_backends(device, dtype)
    if PREFILL_MODE in modes and backend not in sparse:
        raise InputError(f"--backend {name} was given, but sparse attention has {', '.join(sparse)}; use one of these")
    return backend


def make_grid(
    modes: Sequence[str],
    batch_sizes: Sequence[int],
    num_shared: Sequence[int],
    num_unique: Sequence[int],
    num_heads: Sequence[int],
    num_kv_heads: Sequence[int],
    head_dims: Sequence[int],
    unique_seq_len: int | None = None,
) -> tuple[Sizes, ...]:
    """Every combination; unique lengths change fastest. Raises InputError for too many, and for one without a meaning.
    """
    ranges = (batch_sizes, num_heads, num_kv_heads, head_dims, num_shared, num_unique)
    check_combinations(ranges, "rows")
    odd_heads = [f"{heads} to {kv_heads}" for heads, kv_heads in product(num_heads, num_kv_heads) if heads % kv_heads]
    if odd_heads:
        raise InputError(
            f"query heads do not divide by KV heads: {_listed(odd_heads)}; accepted: a multiple of every KV-head count "
            "in --kvheads-range; use other ranges, or several runs"
        )
    odd_dims = [str(dim) for dim in head_dims if dim % 2]
    if odd_dims and OPERATIONS_MODE in modes:
        raise InputError(
            f"--dim-range holds {_listed(odd_dims)}; accepted: even numbers in mode {OPERATIONS_MODE}, for RoPE "
            "rotates pairs; use these"
        )
    if unique_seq_len is not None and unique_seq_len > min(num_unique):
        raise InputError(
            f"--unique-seq-len {unique_seq_len} is above NUM_UNIQUE {min(num_unique)}; accepted: at most the room that "
            "each sequence has; use a shorter one"
        )
    grid = tuple(
        Sizes(b, s, u, u if unique_seq_len is None else unique_seq_len, q, k, d)
        for b, q, k, d, s, u in product(*ranges)
    )
    if PREFILL_MODE in modes and not all(sizes.unique_seq_len for sizes in grid):
        raise InputError(
            f"NUM_UNIQUE 0 leaves nothing to read in mode {PREFILL_MODE}; accepted: 1 or more new tokens of each "
            "sequence in every combination; use other ranges"
        )
    if any(not (sizes.num_shared or sizes.unique_seq_len) for sizes in grid):
        raise InputError(
            "NUM_SHARED 0 with no unique keys leaves nothing to attend to; accepted: one of them above 0 in every "
            "combination; use other ranges"
        )
    return grid


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


