"""Whether a result that is there belongs with those that a run is to measure."""

from collections.abc import Sequence

from engine.bench.result_files import Result
from engine.errors import InputError

# What results of one name have in common, and what of it is in the environment.
_SAME = ("model_name", "attention", "seed", "haystack")
_SAME_ENVIRONMENT = ("device", "dtype", "world_size", "attention_backend", "operations_backend", "cuda_graphs")


def check_same(found: Result, ours: Result, names: Sequence[str], path: str) -> None:
    """Raises InputError when a result that is there, in ``path``, is of other settings: those of every result of
    needles and passkeys, and ``names``."""
    pairs = [(name, getattr(found, name), getattr(ours, name)) for name in (*_SAME, *names)]
    pairs += [(name, found.environment.get(name), ours.environment.get(name)) for name in _SAME_ENVIRONMENT]
    for name, theirs, wanted in pairs:
        if theirs != wanted:
            raise InputError(
                f"{path} was measured with {name.replace('_', ' ')} {theirs}; this run has {wanted}; use another "
                "--save-name or --save-dir"
            )
