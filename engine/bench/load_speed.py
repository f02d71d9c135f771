"""How fast weights are loaded and cut, beside what no program can do without: reading the files, or copying them.

What is timed takes turns: a round times everything once, in an order of its own, and ratios are taken within a round.
A machine whose speed drifts is then as slow for one as for the other. Before each turn another process takes as much
memory as the weights and ends: a virtual machine gets memory from its host many times slower than it hands out what it
has, and whoever came first would pay for all. Then the turn's files are read, so that they lie in the page cache: what
a disk takes would be measured only by emptying that, which needs root. What takes memory itself runs in a process of
its own, as a model is loaded once in each.
"""

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
from rich.console import Console

from engine.bench.breakdown import Series
from engine.bench.environment import describe_environment
from engine.bench.measurement_file import check_new, round_all, round_off, write_measurement
from engine.bench.timing import Timer
from engine.checkpoint import Checkpoint, load_config, resolve_model, weight_shapes, write_checkpoint
from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.dummy import dummy_tensor
from engine.errors import InputError
from engine.loader import load_model
from engine.memory import free_host_bytes
from engine.presets import find_preset
from engine.progress import progress_bar
from engine.shard_writer import write_shards
from engine.sharding import check_world_size

SCHEMA_VERSION = 1
FILE_NAME = "load_speed.yaml"

READ_BUFFER = 2**20  # bytes: stays in a cache
_CPU = torch.device("cpu")
_ROOM = 5  # times the weights, on the disk and in memory: the checkpoint, two splits, a third or a copy, and a model

# What is timed, and for what is ours the yardsticks that it is held against.
WORK = {
    "read": (),  # every byte of the checkpoint's files, into one small buffer
    "fill": (),  # as many bytes of fresh memory: what a loader that copies cannot do without
    "copy": (),  # the files, to the same file system, as cp does
    "copy_synced": (),  # and until they are on the disk
    "load": ("read", "fill"),  # the checkpoint
    "load_shards": ("read", "fill"),  # what was cut for one rank
    "load_ranks": ("read", "fill"),  # the checkpoint, by all ranks at once
    "load_shards_ranks": ("read", "fill"),  # what was cut for them
    "cut": ("copy", "copy_synced"),  # the checkpoint, for all ranks; checked, with checksums, and on the disk
}


@dataclass(frozen=True)
class Plan:
    """Of what the weights are, and how often everything is timed."""

    model_name: str  # a checkpoint's folder, or a preset, of which a checkpoint with random weights is made
    dtype: torch.dtype  # of those; a checkpoint has its own
    num_ranks: int
    num_iters: int  # rounds

    def preset(self) -> ModelConfig | None:
        """A folder comes before a preset of its name."""
        preset = None if Path(self.model_name).expanduser().is_dir() else find_preset(self.model_name)
        return None if preset is None else replace(preset, dtype=self.dtype)


@dataclass(frozen=True)
class LoadSpeed:
    """What was measured. Times are in ms, one a round, for all of the weights."""

    plan: Plan
    num_bytes: int  # of the checkpoint's weights
    environment: dict[str, object]  # as from describe_environment
    times_ms: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in WORK})

    def gbs(self, name: str) -> Series:
        """10^9 bytes of weights a second."""
        return Series([self.num_bytes / ms / 1e6 for ms in self.times_ms[name]])

    def share(self, name: str, yardstick: str) -> Series:
        """The speed over the yardstick's of the same round: 1 is as fast."""
        return Series([y / x for x, y in zip(self.times_ms[name], self.times_ms[yardstick], strict=True)])

    def best_share(self, name: str, yardstick: str) -> float:
        """That of the least times of all rounds: what is left when nothing disturbs either."""
        return min(self.times_ms[yardstick]) / min(self.times_ms[name])


def measure_load_speed(outdir: Path, plan: Plan, console: Console) -> LoadSpeed:
    """Times everything in ``WORK`` and writes ``outdir/load_speed.yaml``; what else it writes there is gone at the end.

    Raises InputError, before anything is written, for an ``outdir`` that has the result already or cannot be written
    to, for a model that cannot be had or cut, and for lack of room on the disk or in memory.
    """
    path = outdir / FILE_NAME
    check_new(path)
    config = plan.preset() or load_config(resolve_model(plan.model_name))
    check_world_size(config.num_heads, config.num_kv_heads, config.intermediate_size, plan.num_ranks)
    num_bytes = config.num_parameters * config.dtype.itemsize
    measured = LoadSpeed(plan, num_bytes, describe_environment(_CPU, config.dtype, plan.num_ranks))
    _check_room(outdir, num_bytes)
    outdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="load-speed-", dir=outdir) as scratch, progress_bar(console) as progress:
        task = progress.add_task("the checkpoint and its splits", total=1 + plan.num_iters * len(_Runner.WORK))
        runner = _Runner(plan, Path(scratch), measured.times_ms)
        progress.advance(task)
        for round_ in range(plan.num_iters):
            for name in Random(round_).sample(_Runner.WORK, len(_Runner.WORK)):
                progress.update(task, description=f"round {round_ + 1}, {name}")
                getattr(runner, name)()
                progress.advance(task)
    write_measurement(path, _described(measured))
    return measured


def _check_room(outdir: Path, num_bytes: int) -> None:
    """A disk that is full, or a page cache that cannot hold everything, would be found out after minutes."""
    existing = next(path for path in (outdir, *outdir.absolute().parents) if path.exists())
    free_bytes = {f"on the disk of {outdir}": shutil.disk_usage(existing).free, "in memory": free_host_bytes()}
    for what, free in free_bytes.items():
        if free < _ROOM * num_bytes:
            raise InputError(
                f"{num_bytes / 1e9:.2f} GB of weights need {_ROOM * num_bytes / 1e9:.2f} GB {what}, which has "
                f"{free / 1e9:.2f} GB free; use a smaller model"
            )


class _Runner:
    """Has the checkpoint and its splits, and times one thing after another."""

    # Those that time something, in the order of WORK; ``copy`` times two.
    WORK = [name for name in WORK if name != "copy_synced"]

    def __init__(self, plan: Plan, scratch: Path, times_ms: dict[str, list[float]]):
        self._plan, self._scratch, self._times_ms = plan, scratch, times_ms
        preset = plan.preset()
        self._folder = resolve_model(plan.model_name) if preset is None else scratch / "checkpoint"
        if preset is not None:
            shapes = weight_shapes(preset).items()
            write_checkpoint(
                self._folder, preset, ((name, dummy_tensor(name, shape, preset.dtype)) for name, shape in shapes)
            )
        with Checkpoint(self._folder) as checkpoint:
            self._files = checkpoint.files()
        self._splits = {size: scratch / f"split-{size}" for size in {1, plan.num_ranks}}
        for size, outdir in self._splits.items():
            write_shards(self._folder, outdir, size, model_name=str(self._folder))

    def read(self) -> None:
        self._warm(self._files)
        self._time("read", lambda: _read(self._files))

    def fill(self) -> None:
        self._warm([])
        self._times_ms["fill"].append(self._fill())

    def copy(self) -> None:
        copies = [self._scratch / f"copy-{number}" for number in range(len(self._files))]

        def copy() -> None:
            for path, target in zip(self._files, copies, strict=True):
                shutil.copyfile(path, target)

        def sync() -> None:
            for target in copies:
                with target.open("rb") as file:
                    os.fsync(file.fileno())

        self._warm(self._files)
        self._time("copy", copy)
        self._time("copy_synced", sync)
        self._times_ms["copy_synced"][-1] += self._times_ms["copy"][-1]
        for target in copies:
            target.unlink()

    def load(self) -> None:
        self._load("load", 1, None)

    def load_shards(self) -> None:
        self._load("load_shards", 1, self._splits[1])

    def load_ranks(self) -> None:
        self._load("load_ranks", self._plan.num_ranks, None)

    def load_shards_ranks(self) -> None:
        self._load("load_shards_ranks", self._plan.num_ranks, self._splits[self._plan.num_ranks])

    def cut(self) -> None:
        outdir, name = self._scratch / "cut", str(self._folder)
        self._warm(self._files)
        self._time("cut", lambda: write_shards(self._folder, outdir, self._plan.num_ranks, model_name=name))
        shutil.rmtree(outdir)

    def _load(self, name: str, num_ranks: int, tp_dir: Path | None) -> None:
        """What the slowest rank takes."""
        self._warm(self._files if tp_dir is None else tp_dir.glob("*.safetensors"))
        store = self._scratch / "store"
        ranks = [(self._folder, tp_dir, rank, num_ranks, store) for rank in range(num_ranks)]
        self._times_ms[name].append(_in_processes(_load_ms, ranks))
        store.unlink(missing_ok=True)

    def _warm(self, files: Iterable[Path]) -> None:
        self._fill()
        _read(files)

    def _fill(self) -> float:
        return _in_processes(_fill_ms, [(sum(path.stat().st_size for path in self._files),)])

    def _time(self, name: str, work: Callable[[], object]) -> None:
        with Timer(_CPU) as timer:
            work()
        self._times_ms[name].append(timer.ms)


def _read(paths: Iterable[Path]) -> None:
    buffer = bytearray(READ_BUFFER)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _in_processes(work: Callable[..., float], arguments: list[tuple]) -> float:
    """The longest of the times, in ms, of ``work`` with each of ``arguments``, all at once in fresh processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(arguments), context) as processes:
        return max([future.result() for future in [processes.submit(work, *each) for each in arguments]])


def _fill_ms(num_bytes: int) -> float:
    with Timer(_CPU) as timer:
        torch.empty(num_bytes, dtype=torch.uint8).fill_(1)
    return timer.ms


def _load_ms(folder: Path, tp_dir: Path | None, rank: int, num_ranks: int, store: Path) -> float:
    torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    group = TPGroup(rank, num_ranks)
    if num_ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    group.barrier()
    try:
        with Timer(_CPU) as timer:
            load_model(folder, group, tp_dir=tp_dir)
    finally:
        group.close()
    return timer.ms


def _described(measured: LoadSpeed) -> dict[str, object]:
    plan = measured.plan
    return {
        "schema_version": SCHEMA_VERSION,
        "model_name": plan.model_name,
        "num_bytes": measured.num_bytes,
        "num_ranks": plan.num_ranks,
        "environment": measured.environment,
        "work": {name: _describe(measured, name) for name in WORK},
    }


def _describe(measured: LoadSpeed, name: str) -> dict[str, object]:
    """What is timed as YAML data: rates in 10^9 bytes/s, speeds as parts of those of the yardsticks."""
    rate = measured.gbs(name)
    described: dict[str, object] = {
        "ms": round_all(measured.times_ms[name]),
        "gbs": {"median": round_off(rate.median), "best": round_off(max(rate.values))} | _spread(rate),
    }
    for yardstick in WORK[name]:
        share = measured.share(name, yardstick)
        best = round_off(measured.best_share(name, yardstick))
        described[f"of_{yardstick}"] = {"median": round_off(share.median), "best_times": best} | _spread(share)
    return described


def _spread(series: Series) -> dict[str, float]:
    return {} if series.spread is None else {"spread": round_off(series.spread)}

