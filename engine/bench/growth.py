"""How the time of a decode step grows with the work: batch, prefix, depth of the tree, sequences that have finished.

Beside each time stands the least that the machine's ceilings allow for the step's bytes and operations, measured just
before it, for a machine's speed drifts. What grows by more than that, something else makes grow.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console

from engine.attention import get_method
from engine.bench.breakdown import Series
from engine.bench.environment import describe_environment
from engine.bench.measurement_file import check_new, round_all, round_off, write_measurement
from engine.bench.modes import ModelOptions
from engine.bench.roofline import decode_step_cost, measure_ceilings, predict_ms
from engine.bench.timing import Timer
from engine.distributed import TPGroup
from engine.engine import Engine
from engine.errors import InputError
from engine.prefix_tree import build_from_levels
from engine.progress import progress_bar
from engine.sampling import SamplingParams

SCHEMA_VERSION = 2
FILE_NAME = "growth.yaml"

_CEILING_SECONDS = 0.6
_SUFFIX = 8  # tokens of each sequence of the last table
_FEW = 8  # its groups that are compared with each other


@dataclass(frozen=True)
class Work:
    """One decode step: ``batch`` sequences below a prefix of ``prefix`` tokens in ``depth`` nodes.

    Level ``l`` of the tree has ``2**l`` nodes, or as many as there are sequences where these are fewer.
    """

    batch: int
    prefix: int
    depth: int = 1

    def level_sizes(self) -> list[int]:
        return [min(2**level, self.batch) for level in range(self.depth)]

    def node_lens(self) -> list[int]:
        """Tokens of a node of each level: all alike, but that the root has what is left over."""
        each = self.prefix // self.depth
        return [self.prefix - each * (self.depth - 1), *[each] * (self.depth - 1)]

    def parents(self) -> list[list[int]]:
        """Of each level but the first, the sequences last: spread evenly over the level above."""
        sizes = [*self.level_sizes(), self.batch]
        return [[j * above // below for j in range(below)] for above, below in pairwise(sizes)]


@dataclass(frozen=True)
class Plan:
    """What is measured. Each of the three lists varies one size of ``base``."""

    base: Work
    batches: tuple[int, ...]
    prefixes: tuple[int, ...]
    depths: tuple[int, ...]
    num_unique: int  # tokens that are generated, 2 or more
    num_finished: int  # sequences that finish in the last table
    attention: str
    model: ModelOptions
    num_iters: int  # times that each is timed

    def axes(self) -> dict[str, list[Work]]:
        sizes = {"batch": self.batches, "prefix": self.prefixes, "depth": self.depths}
        return {axis: [replace(self.base, **{axis: size}) for size in values] for axis, values in sizes.items()}


@dataclass(frozen=True)
class Point:
    """What one kind of step took. Times in ms, one for each iteration."""

    work: Work
    decode_ms: list[float] = field(default_factory=list)  # generating num_unique tokens
    first_token_ms: list[float] = field(default_factory=list)  # generating one
    predicted_ms: float | None = None
    num_bytes: int = 0  # that a step reads at least
    num_flops: int = 0
    message: str | None = None  # why it was not timed

    def step(self, num_unique: int) -> Series | None:
        pairs = zip(self.decode_ms, self.first_token_ms, strict=True)
        steps = [(every - first) / (num_unique - 1) for every, first in pairs]
        return Series(steps) if steps else None


@dataclass(frozen=True)
class Groups:
    """Groups of sequences that ran one after another in one call; times in ms, one for each group."""

    first_token_ms: list[float]  # from the end of the group before to the first tokens: a prefill and a choice
    step_ms: list[float]  # the median step

    def __len__(self) -> int:
        return len(self.step_ms)

    def __getitem__(self, part: slice) -> "Groups":
        return Groups(self.first_token_ms[part], self.step_ms[part])


@dataclass(frozen=True)
class Round:
    """A call in which many sequences finish, and one of few groups right after it, on a machine that is as fast then as
    it was in the other's last groups."""

    many: Groups
    few: Groups

    def growth(self, times: Callable[[Groups], list[float]]) -> float:
        """How many times as long the last groups of the long call take as as many of the short one. The first group of
        a call is left out, which has its start in it."""
        few = times(self.few[1:])
        return statistics.median(times(self.many)[-len(few) :]) / statistics.median(few)


@dataclass(frozen=True)
class Growth:
    plan: Plan
    environment: dict[str, object]  # as from describe_environment
    points: dict[str, list[Point]]  # by axis
    rounds: list[Round]
    message: str | None = None  # why there are no more rounds

    def growth_of_first_tokens(self) -> Series:
        return Series([each.growth(lambda groups: groups.first_token_ms) for each in self.rounds])

    def growth_of_steps(self) -> Series:
        return Series([each.growth(lambda groups: groups.step_ms) for each in self.rounds])


def run_growth(outdir: Path, plan: Plan, group: TPGroup, console: Console) -> Growth:
    """Measures all that ``plan`` names and writes ``outdir/growth.yaml``.

    Raises InputError, before anything is measured, for several ranks, an ``outdir`` that cannot be written to or has
    the file already, and sizes that cannot be run.
    """
    check_new(outdir / FILE_NAME)
    _check(plan, group)
    runner = _Runner(plan, group)
    axes = plan.axes()
    with progress_bar(console) as progress:
        task = progress.add_task("", total=sum(map(len, axes.values())) + plan.num_iters)

        def measured(axis: str, work: Work) -> Point:
            progress.update(task, description=f"batch {work.batch}, prefix {work.prefix}, depth {work.depth}")
            point = runner.measure(work)
            progress.advance(task)
            return point

        points = {axis: [measured(axis, work) for work in works] for axis, works in axes.items()}
        progress.update(task, description=f"{plan.num_finished} sequences that finish")
        rounds, message = [], None
        try:
            for each in runner.measure_finished():
                rounds.append(each)
                progress.advance(task)
        except InputError as error:
            message = str(error)
    growth = Growth(plan, runner.environment, points, rounds, message)
    write_measurement(outdir / FILE_NAME, _described(growth))
    return growth


def _check(plan: Plan, group: TPGroup) -> None:
    if group.size > 1:
        raise InputError(f"growth is measured in one process, not in {group.size}; start it with python")
    positions = plan.model.config().max_positions
    longest = max(work.prefix for works in plan.axes().values() for work in works) + plan.num_unique + _SUFFIX
    if longest > positions:
        raise InputError(
            f"a prefix of {longest - plan.num_unique - _SUFFIX} tokens with {plan.num_unique} new ones and a suffix of "
            f"{_SUFFIX} makes {longest}; accepted: at most {positions}, the model's positions; use fewer"
        )
    for work in plan.axes()["depth"]:
        if work.prefix < work.depth:
            raise InputError(f"a prefix of {work.prefix} tokens has no {work.depth} levels; use a longer prefix")


class _Runner:
    def __init__(self, plan: Plan, group: TPGroup):
        self._plan, self._group = plan, group
        self._config = plan.model.config()
        self._engine = Engine(plan.model.load(group))
        self._random = np.random.default_rng(plan.model.seed)
        self.environment = describe_environment(group.device, self._config.dtype, group.size)

    def measure(self, work: Work) -> Point:
        """Times one kind of step; one that memory does not suffice for is recorded as such."""
        plan, engine = self._plan, self._engine
        engine.max_batch_size = work.batch
        lens, sizes, parents = work.node_lens(), work.level_sizes(), work.parents()
        tree = build_from_levels(
            [*([[0] * length] * size for length, size in zip(lens, sizes, strict=True)), [[0]] * work.batch],
            parents=parents,
        )
        cost = decode_step_cost(get_method(plan.attention), tree, plan.num_unique / 2, self._config)
        point = Point(work, num_bytes=cost.bytes, num_flops=cost.flops)
        try:
            engine.release_caches()
            for size, length, owners in zip(sizes, lens, [None, *parents], strict=False):
                engine.append_shared([self._tokens(length) for _ in range(size)], owners, attention=plan.attention)
            self._generate(work, plan.num_unique)  # warms up
            ceilings = measure_ceilings(self._group.device, self._config.dtype, work.batch, _CEILING_SECONDS)
            for _ in range(plan.num_iters):
                point.decode_ms.append(self._generate(work, plan.num_unique))
                point.first_token_ms.append(self._generate(work, 1))
        except InputError as error:
            return replace(point, decode_ms=[], first_token_ms=[], message=str(error))
        finally:
            engine.release_caches()
        return replace(point, predicted_ms=predict_ms(cost, ceilings))

    def measure_finished(self) -> Iterator[Round]:
        """Calls of sequences of equal length, so that they run in groups, after one that warms up."""
        plan, engine, batch = self._plan, self._engine, self._plan.base.batch
        engine.max_batch_size = batch
        engine.release_caches()
        engine.append_shared([self._tokens(plan.base.prefix)], attention=plan.attention)
        self._groups(1)
        for _ in range(plan.num_iters):
            yield Round(self._groups(max(plan.num_finished // batch, _FEW) + 1), self._groups(_FEW + 1))
        engine.release_caches()

    def _groups(self, count: int) -> Groups:
        """One call of ``count`` groups."""
        plan, batch = self._plan, self._plan.base.batch
        times, sizes = [time.perf_counter()], []

        def on_tokens(num_new: int, _ended: int) -> None:
            times.append(time.perf_counter())
            sizes.append(num_new)

        self._engine.generate(
            [self._tokens(_SUFFIX) for _ in range(count * batch)],
            SamplingParams(temperature=0, max_tokens=plan.num_unique, ignore_eos=True),
            attention=plan.attention,
            shared_cache_op="preserve",
            on_tokens=on_tokens,
        )
        self._check_size(sizes, batch)
        steps = np.diff(times).reshape(count, plan.num_unique) * 1e3
        return Groups(steps[:, 0].tolist(), np.median(steps[:, 1:], axis=1).tolist())

    def _generate(self, work: Work, num_tokens: int) -> float:
        """Generates for each sequence, and returns the time in ms."""
        sizes: list[int] = []
        with Timer(self._group.device) as timer:
            self._engine.generate(
                [()] * work.batch,
                SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True),
                parents=work.parents()[-1],
                attention=self._plan.attention,
                shared_cache_op="preserve",
                on_tokens=lambda num_new, _: sizes.append(num_new),
            )
        self._check_size(sizes, work.batch)
        return timer.ms

    def _check_size(self, sizes: Sequence[int], batch: int) -> None:
        """``sizes`` are those of the steps that were timed."""
        if sizes[0] != batch:
            raise InputError(f"memory has room for {sizes[0]} of {batch} sequences at once; use a smaller batch")

    def _tokens(self, count: int) -> list[int]:
        return self._random.integers(0, self._config.vocab_size, count).tolist()


def growth_factors(points: Sequence[Point], num_unique: int) -> list[tuple[float, float] | None]:
    """For each point how many times as long as the one before its step takes, and is predicted to; None for the first,
    and beside one that was not timed."""
    factors: list[tuple[float, float] | None] = [None]
    for before, after in pairwise(points):
        steps = before.step(num_unique), after.step(num_unique)
        if None in steps:
            factors.append(None)
        else:
            factors.append((steps[1].median / steps[0].median, after.predicted_ms / before.predicted_ms))
    return factors


# ---- the file


def _described(growth: Growth) -> dict[str, object]:
    plan = growth.plan
    return {
        "schema_version": SCHEMA_VERSION,
        "model_name": plan.model.name,
        "seed": plan.model.seed,
        "attention": plan.attention,
        "num_unique": plan.num_unique,
        "environment": growth.environment,
        "points": {axis: [_describe(p, plan.num_unique) for p in points] for axis, points in growth.points.items()},
        "rounds": [
            {name: _describe_groups(groups) for name, groups in (("many", each.many), ("few", each.few))}
            for each in growth.rounds
        ],
    } | ({} if growth.message is None else {"message": growth.message})


def _describe_groups(groups: Groups) -> dict[str, list[float]]:
    return {"first_token_ms": round_all(groups.first_token_ms), "step_ms": round_all(groups.step_ms)}


def _describe(point: Point, num_unique: int) -> dict[str, object]:
    step = point.step(num_unique)
    described = asdict(point.work) | {"bytes": point.num_bytes, "flops": point.num_flops}
    if step is None:
        return described | {"message": point.message}
    return described | {
        "step_ms": round_off(step.median),
        "predicted_ms": round_off(point.predicted_ms),
        "decode_ms": round_all(point.decode_ms),
        "first_token_ms": round_all(point.first_token_ms),
    }


