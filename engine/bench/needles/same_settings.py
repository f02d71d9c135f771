"""Whether results that are there belong with those that a run is to measure."""

from collections.abc import Sequence

from engine.bench.needles.needle_results import NEEDLE_FILES, NeedlesResult
from engine.bench.needles.passkey_results import PASSKEY_FILES, PasskeyResult
from engine.bench.needles.settings import Settings
from engine.errors import InputError

# What all results in one folder have in common, and what of it is in the environment.
_SAME = ("model_name", "model_digest", "attention", "seed", "haystack", "haystack_digest")
_SAME_ENVIRONMENT = (
    "device_name", "dtype", "world_size", "num_threads", "attention_backend", "operations_backend", "cuda_graphs",
    "prefill",
)  # fmt: skip


def check_folder(settings: Settings, method: str, ours: NeedlesResult) -> None:
    """Raises InputError when a method's folder has results, of needles or of passkeys, of another model, text or
    setting than ``ours``: one table would show both."""
    outdir, name = settings.outdir, settings.run_name(method)
    if not outdir.is_dir():
        return
    found = [(result, result.questions) for result in NEEDLE_FILES.read_all([outdir], warn=_ignore)]
    found += [(result, result.length) for result in PASSKEY_FILES.read_all([outdir], warn=_ignore)]
    for result, key in found:
        if key.name == name:
            path = str(key.path(outdir))
            check_same(result, ours, _SAME, path)
            for setting in _SAME_ENVIRONMENT:
                theirs, wanted = (one.environment.get(setting) for one in (result, ours))
                check_equal(setting.replace("_", " "), theirs, wanted, path)


def _ignore(line: str) -> None:
    """What cannot be read is measured again, and named then."""


def check_same(
    found: NeedlesResult | PasskeyResult, ours: NeedlesResult | PasskeyResult, names: Sequence[str], path: str
) -> None:
    """Raises InputError when a result that is there, in ``path``, has other values under ``names``."""
    for name in names:
        check_equal(name.replace("_", " "), getattr(found, name), getattr(ours, name), path)


def check_equal(name: str, theirs: object, ours: object, path: str) -> None:
    """Raises InputError when a setting of the result in ``path`` is not that of this run."""
    if theirs != ours:
        raise InputError(
            f"{path} was measured with {name} {theirs}; this run has {ours}; use another --save-name or --save-dir"
        )
