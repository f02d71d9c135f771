"""Whether results that are there belong with those that a run is to measure."""

from engine.bench.prefill.prefill_results import PREFILL_FILES, PrefillResult
from engine.bench.prefill.settings import Settings
from engine.bench.result_files import Status
from engine.errors import InputError

# What all results in one save directory have in common, and what of it is in the environment.
_SAME = ("model_name", "model_digest", "load_format", "seed", "prompt", "prompt_digest")
SAME_ENVIRONMENT = (
    "device_name", "dtype", "world_size", "num_threads", "attention_backend", "operations_backend",
)  # fmt: skip


def check_folder(settings: Settings, ours: PrefillResult) -> None:
    """Raises InputError when the save directory has results of another model or setting than ``ours``: one table would
    show both."""
    outdir = settings.outdir
    if not outdir.is_dir():
        return
    for found in PREFILL_FILES.read_all([outdir], warn=_ignore):
        path = str(found.point.path(outdir))
        for name in _SAME:
            _check_equal(name, getattr(found, name), getattr(ours, name), path)
        for name in SAME_ENVIRONMENT:
            _check_equal(name, found.environment.get(name), ours.environment.get(name), path)


def check_point(settings: Settings, found: PrefillResult, ours: PrefillResult) -> None:
    """Raises InputError when a result that is there was measured in another way than ``ours`` is to be."""
    path = str(ours.point.path(settings.outdir))
    for name in ("prefill", "attention"):
        _check_equal(name, getattr(found, name), getattr(ours, name), path)
    if found.status == Status.OK:
        _check_equal("timed rounds", len(found.first_token_ms), settings.num_iters, path)
        _check_equal("warm-up rounds", len(found.first_token_warmup_ms), settings.num_warmup, path)


def _ignore(line: str) -> None:
    """What cannot be read is measured again, and named then."""


def _check_equal(name: str, theirs: object, ours: object, path: str) -> None:
    if theirs != ours:
        raise InputError(
            f"{path} was measured with {name.replace('_', ' ')} {theirs}; this run has {ours}; use another --save-dir"
        )
