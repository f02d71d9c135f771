"""Where reading a shared node once pays, measured on the device at hand and kept in the user's cache directory.

A fixed rule is wrong on the next device, so attention method ``auto`` asks here. A measurement takes seconds and holds
for one device, dtype and head shape of a rank, and for the libraries and kernels that it was made with.
"""

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar, get_origin, get_type_hints

import torch

import kernels
from engine.attention import Auto
from engine.attention.crossover import ALWAYS, NEVER, Crossover
from engine.attention.pass_plan import one_prompt, plan_pass
from engine.cpu import read_cpu
from engine.cuda_graphs import capture
from engine.distributed import TPGroup
from engine.files import write_whole
from engine.installed import installed_versions
from engine.kv_cache import make_arena
from engine.prefix_tree import PrefixTree
from kernels import AttentionPlan, Backend

T = TypeVar("T")

SCHEMA_VERSION = 1
NUM_QUERIES = (2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = tuple(16 << i for i in range(11))  # 16 to 16384 tokens
_OWN_KEYS = 64  # of each sequence beside the node's
_ROUNDS = 200  # in which both ways take turns, or as many as fit in the time, but not fewer than these
_MIN_ROUNDS = 3
_SECONDS = 0.2  # of a trial
_ATTEMPTS = 3  # rounds go on for as long again while both ways are nearer to each other than this
_CLEAR = 1.1
_CALLS_ON_GPU = 10
_LIBRARIES = ("torch", "triton", "llvmlite", "tributary")


@dataclass(frozen=True)
class Setting:
    """What a measurement holds for."""

    device: str
    num_threads: int  # of a CPU; 0 on a GPU
    dtype: str
    num_heads: int  # of one rank
    num_kv_heads: int
    head_dim: int
    backend: str | None  # that was asked for; None: the best for each segment
    versions: dict[str, str]
    kernels: str  # a hash of our kernels' sources

    @classmethod
    def of(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        backend: Backend | None,
    ) -> "Setting":
        on_gpu = device.type == "cuda"
        return cls(
            device=torch.cuda.get_device_name(device) if on_gpu else read_cpu().name,
            num_threads=0 if on_gpu else torch.get_num_threads(),
            dtype=str(dtype).removeprefix("torch."),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            backend=None if backend is None else str(backend),
            versions=installed_versions(_LIBRARIES),
            kernels=_hash_of_kernels(),
        )

    @property
    def is_current(self) -> bool:
        """Whether libraries and kernels are those of this process; other measurements are never read again."""
        return (self.versions, self.kernels) == (installed_versions(_LIBRARIES), _hash_of_kernels())

    @property
    def path(self) -> Path:
        """The file that keeps the measurement."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return cache_directory() / f"crossover-{digest[:16]}.json"


@dataclass(frozen=True)
class Trial:
    """A decode step's attention to a node of ``length`` keys, and to own ones, by ``num_queries`` queries."""

    num_queries: int
    length: int
    shared_ms: float  # the least of the rounds: what else the machine does can only add to a time
    alone_ms: float


@dataclass(frozen=True)
class Calibration:
    """A measurement: what decides, and the trials that it rests on."""

    setting: Setting
    crossover: Crossover
    trials: tuple[Trial, ...]


def cache_directory() -> Path:
    """Where measurements are kept: ``$TRIBUTARY_CACHE``, or ``tributary`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("TRIBUTARY_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tributary"


def find_crossover(group: TPGroup, setting: Setting, dtype: torch.dtype) -> Crossover:
    """What decides in this setting, the same on every rank: rank 0 reads it, or measures and keeps it."""
    return group.on_rank_0(lambda: _read_or_measure(setting, group.device, dtype)).crossover


def _read_or_measure(setting: Setting, device: torch.device, dtype: torch.dtype) -> Calibration:
    if (known := read(setting.path)) is not None and known.setting == setting:
        return known
    calibration = measure(setting, device, dtype)
    try:
        write(calibration)
    except OSError as error:
        warnings.warn(f"a calibration could not be kept, and is made again by the next process: {error}", stacklevel=2)
    return calibration


# ---- measuring


def measure(setting: Setting, device: torch.device, dtype: torch.dtype) -> Calibration:
    """Looks, for each number of queries, for the length from which on sharing pays.

    The more queries, the shorter it is; so each search begins where the one before ended, and goes to longer nodes
    until sharing pays, or to shorter ones as long as it does. Near that length both ways take about the same time, and
    a trial may say either; so what has been found is evened out at the end.
    """
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "a capture records, it does not run"
    work = _Work(setting, device, dtype)
    trials: list[Trial] = []

    def pays(num_queries: int, place: int) -> bool:
        trials.append(work.try_both(num_queries, LENGTHS[place]))
        return trials[-1].shared_ms < trials[-1].alone_ms

    places: list[int] = []  # of the least length that pays, one past the last where none does
    place = len(LENGTHS) - 1
    for num_queries in NUM_QUERIES:
        if pays(num_queries, place):
            while place > 0 and pays(num_queries, place - 1):
                place -= 1
        else:
            place += 1
            while place < len(LENGTHS) and not pays(num_queries, place):
                place += 1
        places.append(place)
        place = min(place, len(LENGTHS) - 1)
    found = (None if place >= len(LENGTHS) else LENGTHS[place] for place in _evened_out(places))
    return Calibration(setting, Crossover(NUM_QUERIES, tuple(found)), tuple(trials))


def _evened_out(places: Sequence[int]) -> list[int]:
    """The numbers that do not rise and are nearest to ``places``, by least squares, rounded up: neighbours that rise
    are replaced by their mean (pool adjacent violators; Ayer et al., 1955)."""
    pools: list[tuple[float, int]] = []  # (mean, how many)
    for place in places:
        pools.append((float(place), 1))
        while len(pools) > 1 and pools[-1][0] > pools[-2][0]:
            (mean, count), (before, count_before) = pools.pop(), pools.pop()
            total = count + count_before
            pools.append(((mean * count + before * count_before) / total, total))
    return [math.ceil(mean - 1e-9) for mean, count in pools for _ in range(count)]


class _Work:
    """Keys, values and queries of a layer that has room for every trial."""

    def __init__(self, setting: Setting, device: torch.device, dtype: torch.dtype):
        self._device, self._dtype = device, dtype
        self._backend = None if setting.backend is None else Backend(setting.backend)
        num_slots = LENGTHS[-1] + NUM_QUERIES[-1] * _OWN_KEYS
        shape = (num_slots, setting.num_kv_heads, setting.head_dim)
        self._keys, self._values = (make_arena(*shape, dtype, device).normal_() for _ in range(2))
        self._queries = torch.randn(NUM_QUERIES[-1], setting.num_heads, setting.head_dim, device=device).to(dtype)

    def try_both(self, num_queries: int, length: int) -> Trial:
        tree = one_prompt(length, num_queries)
        calls = [self._prepared(Auto(crossover), tree) for crossover in (ALWAYS, NEVER)]
        for call in calls:
            self._time(call)
        times: list[list[float]] = []
        for _ in range(_ATTEMPTS):
            began, least = time.perf_counter(), len(times) + _MIN_ROUNDS
            while len(times) < least or (len(times) < _ROUNDS and time.perf_counter() - began < _SECONDS):
                times.append([self._time(call) for call in calls])
            shared, alone = (min(own) * 1e3 for own in zip(*times, strict=True))
            if not 1 / _CLEAR < shared / alone < _CLEAR:
                break
        return Trial(num_queries, length, shared, alone)

    def _prepared(self, method: Auto, tree: PrefixTree) -> Callable[[], object]:
        step = plan_pass(method, tree, _OWN_KEYS, _OWN_KEYS)
        plan = AttentionPlan.of(step.segments, self._device, self._dtype, self._backend)
        queries, scale = self._queries[: tree.num_sequences], self._queries.shape[2] ** -0.5

        def attend() -> object:
            return plan.run(queries, self._keys, self._values, scale)

        return capture(attend, self._device)[0] if self._device.type == "cuda" else attend

    def _time(self, call: Callable[[], object]) -> float:
        """Seconds of one call; on a GPU the mean of a few, so that the wait for it does not count."""
        num_calls = _CALLS_ON_GPU if self._device.type == "cuda" else 1
        self._synchronize()
        began = time.perf_counter()
        for _ in range(num_calls):
            call()
        self._synchronize()
        return (time.perf_counter() - began) / num_calls

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


# ---- files


def write(calibration: Calibration) -> None:
    path = calibration.setting.path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"schema_version": SCHEMA_VERSION} | asdict(calibration), indent=1).encode())


def read(path: Path) -> Calibration | None:
    """What a file holds; None for one that is missing, damaged or of another version, as it is then measured anew."""
    try:
        fields = json.loads(path.read_bytes())
        if fields.pop("schema_version") != SCHEMA_VERSION:
            return None
        crossover = fields["crossover"]
        return Calibration(
            _made(Setting, fields["setting"]),
            _checked(Crossover(tuple(crossover["num_queries"]), tuple(crossover["lengths"]))),
            tuple(_made(Trial, trial) for trial in fields["trials"]),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError):
        return None


def _made(kind: type[T], fields: dict[str, object]) -> T:
    """Raises ValueError for a field of another type."""
    made = kind(**fields)
    for name, hint in get_type_hints(kind).items():
        accepted = (int, float) if hint is float else get_origin(hint) if get_origin(hint) is dict else hint
        if not isinstance(getattr(made, name), accepted):
            raise ValueError(f"{name} is of another type")
    return made


def _checked(crossover: Crossover) -> Crossover:
    """Raises ValueError for what no measurement has."""
    if crossover.num_queries != NUM_QUERIES or not set(crossover.lengths) <= {*LENGTHS, None}:
        raise ValueError("not a crossover of these measurements")
    return crossover


def kept() -> list[tuple[Path, Calibration | None]]:
    """Every file of the cache directory and what it holds, None for one that cannot be used."""
    return [(path, read(path)) for path in sorted(cache_directory().glob("crossover-*.json"))]


@cache
def _hash_of_kernels() -> str:
    digest = hashlib.sha256()
    folder = Path(kernels.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
