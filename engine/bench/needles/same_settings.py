"""Whether a result that is there belongs with those that a run is to measure."""

from collections.abc import Sequence

from engine.bench.result_files import Result
from engine.errors import InputError

# What results of one name have in common, and what of it is in the environment.
_SAME = ("model_name", "attention", "seed", "haystack")
_SAME_ENVIRONMENT = (
    "device_name", "dtype", "world_size", "num_threads", "attention_backend", "operations_backend", "cuda_graphs",
)  # fmt: skip


def check_same(found: Result, ours: Result, names: Sequence[str], path: str) -> None:
    """Raises InputError when a result that is there, in ``path``, is of other settings: those of every result of
    needles and passkeys, and ``names``."""
    pairs = [(name, getattr(found, name), getattr(ours, name)) for name in (*_SAME, *names)]
    pairs += [(name, found.environment.get(name), ours.environment.get(name)) for name in _SAME_ENVIRONMENT]
    for name, theirs, wanted in pairs:
        check_equal(name.replace("_", " "), theirs, wanted, path)


def check_equal(name: str, theirs: object, ours: object, path: str) -> None:
    """Raises InputError when a setting of the result in ``path`` is not that of this run."""
    if theirs != ours:
        raise InputError(
            f"{path} was measured with {name} {theirs}; this run has {ours}; use another --save-name or --save-dir"
        )
