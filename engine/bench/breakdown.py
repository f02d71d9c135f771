"""Where a decode step's time goes: each mode's step beside the operations that it cannot do without.

A machine's speed drifts within minutes, by more than what is to be told apart. So the modes take turns: a round times
one step of every mode, and the operations alone, next to each other. Differences and ratios are taken within a round,
and the median over the rounds is reported.

Shapes: B sequences, S shared tokens, Hkv KV heads, G query heads of a KV head, D head dimension.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from engine.arena import fits_beside
from engine.attention import METHODS
from engine.bench.attention_spans import AttentionSpans
from engine.bench.engine_mode import EngineMode
from engine.bench.environment import describe_environment
from engine.bench.measurement_file import check_new, round_all, round_off, write_measurement
from engine.bench.memory_model import footprint
from engine.bench.modes import HF_MODES, Mode, ModelOptions, make_mode, make_prompt
from engine.bench.results import Cell
from engine.bench.roofline import read_gbs
from engine.bench.timing import HIGH_SPREAD, Timer, best_of, summarize
from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.memory import available_bytes, is_out_of_memory
from engine.model import Transformer
from engine.progress import progress_bar
from kernels import AttentionPlan, Backend, Segment
from kernels.linear import linear

SCHEMA_VERSION = 3
FILE_NAME = "breakdown.yaml"

REPEATS = 20
_WARM_UP_TOKENS = 4  # of each mode in each round
_PREFILLED = ("hydragen", "hf")  # modes whose prefill is timed: the others' is one of these, or has no attention
_READ_SECONDS = 0.1  # each measurement of the rate at which the machine reads


@dataclass(frozen=True)
class Comparison:
    """Which modes are timed, at which sizes, and how often."""

    modes: tuple[str, ...]
    batch_size: int
    shared_lens: tuple[int, ...]  # tokens
    num_unique: int  # tokens, 2 or more
    model: ModelOptions
    num_iters: int  # rounds
    hf_iters: int  # rounds that hf takes part in, the first ones: its step takes many times longer

    def num_rounds(self, mode: str) -> int:
        return min(self.hf_iters, self.num_iters) if mode == "hf" else self.num_iters


@dataclass(frozen=True)
class Series:
    """A quantity that every round has a value of."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float | None:
        """20th to 80th percentile as a fraction of the median; None for a single value, which has none."""
        return abs(summarize(self.values).relative) if len(self.values) > 1 else None

    @property
    def high_spread(self) -> bool:
        return self.spread is not None and self.spread > HIGH_SPREAD


@dataclass(frozen=True)
class Point:
    """What was measured at one shared length. Times are in ms, one a round; a mode may have fewer, of the first rounds.

    ``alone`` is each round's best of 20 calls on warm, contiguous data.
    """

    num_shared: int
    num_unique: int
    kv_bytes: int  # keys and values that the baseline reads in a step
    matmul_alone_ms: list[float] = field(default_factory=list)
    prefix_alone_ms: list[float] = field(default_factory=list)
    prefix_aten_ms: list[float] = field(default_factory=list)  # on CPU: the same by PyTorch's own kernel
    read_gbs: list[float] = field(default_factory=list)  # 10^9 bytes/s: what this machine reads when the baseline does
    decode_ms: dict[str, list[float]] = field(default_factory=dict)  # by mode: generating num_unique tokens
    first_token_ms: dict[str, list[float]] = field(default_factory=dict)  # generating one: what decode_ms has besides
    prefill_ms: dict[str, list[float]] = field(default_factory=dict)  # by mode: computing the shared prompt
    span_ms: dict[str, list[float]] = field(default_factory=dict)  # by mode of ours: AttentionSpans of those steps
    failures: dict[str, str] = field(default_factory=dict)  # by mode: why it was not timed, or not to the end

    def step_ms(self, mode: str) -> list[float]:
        """One decode step of ``mode``, one time a round. A time that is lost in noise can be negative."""
        pairs = zip(self.decode_ms.get(mode, ()), self.first_token_ms.get(mode, ()), strict=True)
        return [(every - first) / (self.num_unique - 1) for every, first in pairs]

    def _attention_ms(self, mode: str) -> list[float]:
        """What attention takes in a step of ``mode``: the part of its span that noattention does not have."""
        return _less(self.span_ms.get(mode, ()), self.span_ms.get("noattention", ()))

    def least(self) -> "Point":
        """This point with the least time, and the highest rate, of all rounds in place of each: what everything takes
        when nothing else disturbs it. The operations alone are such times already."""

        def least_of(times: dict[str, list[float]]) -> dict[str, list[float]]:
            return {mode: [min(values)] for mode, values in times.items() if values}

        return replace(
            self,
            matmul_alone_ms=[min(self.matmul_alone_ms)],
            prefix_alone_ms=[min(self.prefix_alone_ms)],
            prefix_aten_ms=[min(self.prefix_aten_ms)] if self.prefix_aten_ms else [],
            read_gbs=[max(self.read_gbs)] if self.read_gbs else [],
            decode_ms=least_of(self.decode_ms),
            first_token_ms=least_of(self.first_token_ms),
            prefill_ms=least_of(self.prefill_ms),
            span_ms=least_of(self.span_ms),
        )

    def figures(self) -> dict[str, Series]:
        """What the times amount to, without what lacks a mode or would divide by a time that is lost in noise.

        - ``MODE_ms``: a step.
        - ``noattention_per_matmul``: a step without attention over its matrix products alone.
        - ``added_ms``: what attention takes in a step of hydragen; ``added_per_prefix``: that over the prefix attention
          alone. ``step_added_ms``, ``step_added_per_prefix``: the same by how much longer the whole step takes.
        - ``prefix_aten_per_alone``: PyTorch's own kernel for CPU over that, in time.
        - ``noshared_gbs``: the rate at which the baseline's attention reads keys and values, 10^9 bytes/s;
          ``noshared_per_read``: that over the rate at which the machine reads. ``step_noshared_per_read``: the same by
          how much longer the whole step takes.
        - ``hf_per_hydragen``, ``hf_static_per_hydragen``: how many times faster hydragen is than transformers.
        - ``MODE_prefill_ms``: computing the shared prompt; ``hf_prefill_per_hydragen``: how many times as long
          transformers takes for it.
        """
        noattention, hydragen, noshared = map(self.step_ms, ("noattention", "hydragen", "hydragen_noshared"))
        added_ms, step_added_ms = self._attention_ms("hydragen"), _less(hydragen, noattention)
        noshared_gbs, step_noshared_gbs = (
            _over([self.kv_bytes / 1e6] * len(times), times)
            for times in (self._attention_ms("hydragen_noshared"), _less(noshared, noattention))
        )
        found = {
            **{f"{mode}_ms": self.step_ms(mode) for mode in self.decode_ms},
            "noattention_per_matmul": _over(noattention, self.matmul_alone_ms),
            "added_ms": added_ms,
            "added_per_prefix": _over(added_ms, self.prefix_alone_ms),
            "step_added_ms": step_added_ms,
            "step_added_per_prefix": _over(step_added_ms, self.prefix_alone_ms),
            "prefix_aten_per_alone": _over(self.prefix_aten_ms, self.prefix_alone_ms),
            "noshared_gbs": noshared_gbs,
            "noshared_per_read": _over(noshared_gbs, self.read_gbs),
            "step_noshared_per_read": _over(step_noshared_gbs, self.read_gbs),
            **{f"{mode}_per_hydragen": _over(self.step_ms(mode), hydragen) for mode in HF_MODES},
            **{f"{mode}_prefill_ms": times for mode, times in self.prefill_ms.items()},
            "hf_prefill_per_hydragen": _over(*(self.prefill_ms.get(mode, ()) for mode in ("hf", "hydragen"))),
        }
        return {name: Series(values) for name, values in found.items() if values}


def _less(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """``a - b`` in each of the first rounds, which have both."""
    return [x - y for x, y in zip(a, b, strict=False)]


def _over(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """``a / b`` in each of the first rounds, which have both; nothing where a divisor is lost in noise."""
    pairs = list(zip(a, b, strict=False))
    return [] if any(y <= 0 for _, y in pairs) else [x / y for x, y in pairs]


@dataclass(frozen=True)
class Breakdown:
    """A comparison's measurements, one point a shared length."""

    comparison: Comparison
    environment: dict[str, object]  # as from describe_environment
    points: list[Point]


# ---- measuring


def run_breakdown(outdir: Path, comparison: Comparison, group: TPGroup, console: Console) -> Breakdown:
    """Times the modes and the operations alone, turn by turn, and writes ``outdir/breakdown.yaml``.

    Raises InputError, before anything is measured, for several ranks, for an ``outdir`` that cannot be written to or
    has the file already, and for modes or lengths that cannot be compared.
    """
    config = comparison.model.config()
    _check(comparison, config, group)
    check_new(outdir / FILE_NAME)
    runner = _Runner(comparison, config, group)
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(comparison.shared_lens) * runner.turns_per_length)
        points = [runner.measure(num_shared, progress, task) for num_shared in comparison.shared_lens]
    breakdown = Breakdown(comparison, runner.environment, points)
    write_measurement(outdir / FILE_NAME, _described(breakdown))
    return breakdown


def _check(comparison: Comparison, config: ModelConfig, group: TPGroup) -> None:
    if group.size > 1:
        raise InputError(f"a step is taken apart in one process, not in {group.size}; start it with python")
    for mode in comparison.modes:
        if comparison.modes.count(mode) > 1:
            raise InputError(f"the modes hold {mode} twice; accepted: each once; leave one out")
    longest, positions = max(comparison.shared_lens) + comparison.num_unique, config.max_positions
    if longest > positions:
        raise InputError(
            f"{max(comparison.shared_lens)} shared and {comparison.num_unique} unique tokens make {longest}; accepted: "
            f"at most {positions}, the model's positions; use fewer"
        )


class _Runner:
    """Has every mode loaded, the engine's own on one model, and measures one shared length after another."""

    def __init__(self, comparison: Comparison, config: ModelConfig, group: TPGroup):
        self._comparison, self._config, self._group = comparison, config, group
        options = comparison.model
        self._model = options.load(group)
        self._modes: dict[str, Mode] = {
            name: EngineMode(name, self._model)
            if name in METHODS
            else make_mode(name, options, group, None, comparison.batch_size)
            for name in comparison.modes
        }
        self.environment = describe_environment(group.device, config.dtype, group.size)

    @property
    def turns_per_length(self) -> int:
        """Steps of the progress bar: each mode's set-up and rounds, and the operations alone."""
        comparison = self._comparison
        return sum(1 + comparison.num_rounds(mode) for mode in self._modes) + comparison.num_iters

    def measure(self, num_shared: int, progress: Progress, task: TaskID) -> Point:
        """All rounds at one shared length. A mode that memory does not suffice for is left out from then on."""
        comparison = self._comparison
        history = num_shared + comparison.num_unique // 2  # in the mean: own keys are 1, 2, ... num_unique - 1
        kv_bytes = _kv_bytes(self._config, comparison.batch_size, history)
        point = Point(num_shared, comparison.num_unique, kv_bytes)
        prompt = make_prompt(self._config.vocab_size, num_shared, comparison.model.seed)
        try:
            for name in self._modes:
                progress.update(task, description=f"shared {num_shared}, {name}, set-up")
                self._attempt(name, point, lambda name=name: self._prepare(name, prompt))
                progress.advance(task)
            for round_ in range(comparison.num_iters):
                where = f"shared {num_shared}, round {round_ + 1}"
                progress.update(task, description=f"{where}, operations alone")
                self._time_alone(point)
                progress.advance(task)
                for name in self._modes:
                    if round_ >= comparison.num_rounds(name):
                        continue
                    progress.update(task, description=f"{where}, {name}")
                    if name not in point.failures:
                        self._attempt(name, point, lambda name=name: self._time_mode(name, point, prompt))
                    progress.advance(task)
        finally:
            for mode in self._modes.values():
                mode.release()
        return point

    def _attempt(self, name: str, point: Point, work: Callable[[], None]) -> None:
        """Does a mode's work; when it runs out of memory, gives back what it has and records why."""
        try:
            work()
        except InputError as error:
            failure = str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = ": ".join(["out of memory", *str(error).splitlines()[:1]])
        else:
            return
        point.failures[name] = failure
        self._modes[name].release()

    def _prepare(self, name: str, prompt: list[int]) -> None:
        """Sets the mode up beside those that are set up already, and warms it up.

        Raises InputError, or an out-of-memory error, when that needs more memory than is left.
        """
        comparison, mode = self._comparison, self._modes[name]
        cell = Cell(name, comparison.batch_size, len(prompt), comparison.num_unique)
        needed, free = footprint(self._config, self._group.size, cell), available_bytes(self._group)
        # Beforehand: a system that hands out more memory than it has ends the process instead of raising an error.
        if needed is not None and not fits_beside(free, needed.cache, needed.activations):
            raise InputError(
                f"needs {(needed.cache + needed.activations) / 2**30:.2f} GiB beside the weights; accepted: what fits "
                f"in the {free / 2**30:.2f} GiB that are free, with a reserve; use a smaller batch or fewer modes"
            )
        mode.set_up(cell)
        mode.prefill(prompt)
        mode.generate(2 if name == "hf" else comparison.num_unique)  # every step of hf is as its first, and slow

    def _time_mode(self, name: str, point: Point, prompt: list[int]) -> None:
        if name in _PREFILLED:
            with Timer(self._group.device) as timer:
                self._modes[name].prefill(prompt)
            point.prefill_ms.setdefault(name, []).append(timer.ms)
        self._time_step(name, point)

    def _time_step(self, name: str, point: Point) -> None:
        # A library that a mode loads or calls could change the process's number, and a ratio would not be fair.
        threads = torch.get_num_threads()
        assert threads == self.environment["num_threads"], f"{threads} threads, not the same for all modes"
        if name != "hf":  # the mode before has left other data in the caches
            self._modes[name].generate(min(_WARM_UP_TOKENS, point.num_unique))
        reads = name == "hydragen_noshared"  # and this machine's rate can be another a second later
        rates = [read_gbs(self._group.device, _READ_SECONDS)] if reads else []
        with AttentionSpans(self._model, self._group.device) as spans:
            every = self._time(name, point.num_unique)
        if reads:
            rates.append(read_gbs(self._group.device, _READ_SECONDS))
            point.read_gbs.append(statistics.mean(rates))
        first = self._time(name, 1)
        if name in METHODS:
            point.span_ms.setdefault(name, []).append(spans.median_ms())
        point.decode_ms.setdefault(name, []).append(every)
        point.first_token_ms.setdefault(name, []).append(first)

    def _time(self, name: str, num_tokens: int) -> float:
        with Timer(self._group.device) as timer:
            self._modes[name].generate(num_tokens)
        return timer.ms

    def _time_alone(self, point: Point) -> None:
        batch_size, device = self._comparison.batch_size, self._group.device
        point.matmul_alone_ms.append(matmul_alone_ms(self._model, batch_size, device))
        point.prefix_alone_ms.append(prefix_alone_ms(self._model, batch_size, point.num_shared, device))
        if device.type == "cpu":
            aten_ms = prefix_alone_ms(self._model, batch_size, point.num_shared, device, Backend.ATEN)
            point.prefix_aten_ms.append(aten_ms)


def matmul_alone_ms(model: Transformer, batch_size: int, device: torch.device) -> float:
    """A step's matrix products: those of one layer, times the layers, and the output head's."""
    layer = model.layers[0]
    projections = [layer.attention.qkv_proj, layer.attention.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj]

    def best(weights: list[torch.Tensor]) -> float:
        rows = [torch.randn(batch_size, w.shape[1], device=device).to(w.dtype) for w in weights]
        times = best_of(
            lambda: [linear(x, w) for x, w in zip(rows, weights, strict=True)], REPEATS, 2, device
        )
        return min(times)

    return len(model.layers) * best([p.weight for p in projections]) + best([model.head.weight])


def prefix_alone_ms(
    model: Transformer, batch_size: int, num_shared: int, device: torch.device, backend: Backend | None = None
) -> float:
    """A step's attention of all queries to the shared keys: one call, times the layers."""
    attention = model.layers[0].attention
    heads, D, dtype = attention.num_kv_heads, attention.head_dim, model.config.dtype
    num_queries = batch_size * attention.num_heads // heads  # a group's heads are so many more queries
    q_HTD = torch.randn(heads, num_queries, D, device=device).to(dtype)
    k_HSD, v_HSD = torch.randn(2, heads, num_shared, D, device=device).to(dtype)
    segment = Segment(np.array([0, num_queries]), np.array([0]), np.array([num_shared]))
    plan = AttentionPlan.of([segment], device, dtype, backend)
    q, k, v = (x.transpose(0, 1) for x in (q_HTD, k_HSD, v_HSD))
    return len(model.layers) * min(best_of(lambda: plan.run_state(q, k, v, attention.scale), REPEATS, 2, device))


def _kv_bytes(config: ModelConfig, batch_size: int, history: int) -> int:
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * batch_size * history * config.dtype.itemsize


# ---- the file


def _described(breakdown: Breakdown) -> dict[str, object]:
    comparison = breakdown.comparison
    return {
        "schema_version": SCHEMA_VERSION,
        "model_name": comparison.model.name,
        "seed": comparison.model.seed,
        "batch_size": comparison.batch_size,
        "num_unique": comparison.num_unique,
        "environment": breakdown.environment,
        "points": [_describe(point, comparison.modes) for point in breakdown.points],
    }


def _describe(point: Point, modes: Sequence[str]) -> dict[str, object]:
    """The point as YAML data."""
    described_modes: dict[str, dict[str, object]] = {}
    for mode in modes:
        described_modes[mode] = {
            "decode_ms": round_all(point.decode_ms.get(mode, ())),
            "first_token_ms": round_all(point.first_token_ms.get(mode, ())),
        }
        if mode in point.prefill_ms:
            described_modes[mode]["prefill_ms"] = round_all(point.prefill_ms[mode])
        if mode in point.span_ms:
            described_modes[mode]["span_ms"] = round_all(point.span_ms[mode])
        if mode in point.failures:
            described_modes[mode]["message"] = point.failures[mode]
    least = point.least().figures()
    figures = {
        name: {
            "median": round_off(series.median),
            "spread": None if series.spread is None else round_off(series.spread),
            "least": round_off(least[name].median) if name in least else None,
            "rounds": round_all(series.values),
        }
        for name, series in point.figures().items()
    }
    return {
        "num_shared": point.num_shared,
        "modes": described_modes,
        "matmul_alone_ms": round_all(point.matmul_alone_ms),
        "prefix_alone_ms": round_all(point.prefix_alone_ms),
        "prefix_aten_ms": round_all(point.prefix_aten_ms),
        "read_gbs": round_all(point.read_gbs),
        "kv_bytes": point.kv_bytes,
        "figures": figures,
    }


