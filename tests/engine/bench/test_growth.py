"""What a growth measurement runs, predicts and writes; not how long it takes."""

import dataclasses
import io
from itertools import pairwise

import pytest
import yaml
from models import passes
from rich.console import Console

from engine.bench import growth
from engine.bench.growth import Groups, Growth, Plan, Point, Round, Work, growth_factors, run_growth
from engine.bench.growth_table import print_growth
from engine.bench.modes import ModelOptions
from engine.bench.roofline import Ceilings
from engine.distributed import TPGroup
from engine.engine import Engine
from engine.errors import InputError

PLAN = Plan(
    base=Work(4, 24),
    batches=(1, 2, 5),
    prefixes=(8, 16),
    depths=(1, 2, 3),
    num_unique=3,
    num_finished=50,
    attention="hydragen",
    model=ModelOptions("tiny", load_format="dummy"),
    num_iters=2,
)
QUIET = Console(file=io.StringIO(), quiet=True)


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    monkeypatch.setattr(growth, "measure_ceilings", lambda device, dtype, rows, seconds: Ceilings(10, 1, 0.5, rows))


def test_a_tree_of_equal_levels():
    work = Work(batch=5, prefix=11, depth=4)
    assert work.level_sizes() == [1, 2, 4, 5] and work.node_lens() == [5, 2, 2, 2]
    assert work.parents() == [[0, 0], [0, 0, 1, 1], [0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert Work(3, 7).level_sizes() == [1] and Work(3, 7).parents() == [[0, 0, 0]]


@pytest.mark.parametrize("attention", ["hydragen", "hydragen_noshared", "noattention"])
def test_what_it_writes(tmp_path, attention):
    plan = dataclasses.replace(PLAN, attention=attention)
    found = run_growth(tmp_path / "new", plan, TPGroup(), QUIET)
    written = yaml.safe_load((tmp_path / "new" / "growth.yaml").read_text())
    assert {axis: [p[axis] for p in points] for axis, points in written["points"].items()} == {
        "batch": [1, 2, 5],
        "prefix": [8, 16],
        "depth": [1, 2, 3],
    }
    for points in written["points"].values():
        for point in points:
            assert len(point["decode_ms"]) == len(point["first_token_ms"]) == 2
            assert point["predicted_ms"] > 0 and point["bytes"] > 0 and point["flops"] > 0
    grows = [p["bytes"] for p in written["points"]["prefix"]]
    assert (grows[0] < grows[1]) == (attention != "noattention")
    assert [(len(r["many"]["step_ms"]), len(r["few"]["first_token_ms"])) for r in written["rounds"]] == [(13, 9)] * 2
    printed = io.StringIO()
    print_growth(found, Console(file=printed, width=140))
    titles = ("Step time by batch (prefix 24, depth 1)", "Step time by depth (batch 4, prefix 24)")
    for line in (*titles, "24 to 48", "a new call", "last over new"):
        assert line in printed.getvalue()
    with pytest.raises(InputError, match=r"growth.yaml exists; accepted: an OUTDIR without one"):
        run_growth(tmp_path / "new", plan, TPGroup(), QUIET)


def test_steps_are_of_the_tree_that_is_named(monkeypatch):
    """Depth 3 of a prefix of 24: nodes of 8, one, two and four of them, and then steps of all five sequences."""
    model = PLAN.model.load(TPGroup())
    monkeypatch.setattr(ModelOptions, "load", lambda self, group: model)
    runner = growth._Runner(PLAN, TPGroup())
    with passes(model) as seen:
        point = runner.measure(Work(5, 24, 3))
    sizes = [p.num_tokens for p in seen]
    assert sizes[:3] == [8, 16, 32] and set(sizes[3:]) == {5} and len(sizes) == 3 + 3 * 2
    assert point.message is None and runner._engine.arena.num_used == 0


def test_what_has_no_room_is_recorded(tmp_path, monkeypatch):
    def no_room(self, *_args, **_options):
        raise InputError("the shared level needs room")

    monkeypatch.setattr(Engine, "append_shared", no_room)
    point = growth._Runner(PLAN, TPGroup()).measure(Work(4, 24))
    assert (point.message, point.step(3), point.decode_ms) == ("the shared level needs room", None, [])
    printed = io.StringIO()
    groups = Groups([1.0] * 9, [2.0] * 9)
    print_growth(Growth(PLAN, {}, {"batch": [point]}, [Round(groups, groups)]), Console(file=printed, width=140))
    assert "the shared level needs room" in printed.getvalue()


def test_finished_sequences_are_held_against_a_new_call():
    many = Groups([*range(20)], [1.0] * 12 + [3.0] * 8)
    few = Groups([100.0] + [5.0] * 8, [100.0] + [2.0] * 8)
    found = Growth(PLAN, {}, {}, [Round(many, few)] * 3)
    assert (found.growth_of_first_tokens().median, found.growth_of_steps().median) == (15.5 / 5, 1.5)


def test_growth_is_to_the_point_before():
    def point(ms, predicted_ms, message=None):
        times = [] if message else [2 * ms + 1]
        return Point(Work(1, 1), times, [1.0] * len(times), predicted_ms, message=message)

    found = growth_factors([point(3, 1), point(6, 4), point(0, None, "no room"), point(9, 5)], 3)
    assert found == [None, (pytest.approx(2), pytest.approx(4)), None, None]


def test_more_sequences_than_there_is_room_for_at_once_are_not_timed(monkeypatch):
    runner = growth._Runner(PLAN, TPGroup())
    monkeypatch.setattr(Engine, "max_batch_size", property(lambda self: 3, lambda self, value: None), raising=False)
    assert runner.measure(Work(4, 24)).message.startswith("memory has room for 3 of 4 sequences at once")


def test_what_was_timed_is_kept_when_the_last_table_has_no_room(tmp_path, monkeypatch):
    plan = dataclasses.replace(PLAN, batches=(1, 3), depths=(1,), base=Work(3, 24))
    measure_finished = growth._Runner.measure_finished

    def with_little_room(self):
        monkeypatch.setattr(Engine, "max_batch_size", property(lambda self: 2, lambda self, value: None), raising=False)
        return measure_finished(self)

    monkeypatch.setattr(growth._Runner, "measure_finished", with_little_room)
    found = run_growth(tmp_path / "new", plan, TPGroup(), QUIET)
    written = yaml.safe_load((tmp_path / "new" / "growth.yaml").read_text())
    assert written["points"]["batch"][1]["step_ms"] and written["rounds"] == []
    assert written["message"] == "memory has room for 2 of 3 sequences at once; use a smaller batch"
    printed = io.StringIO()
    print_growth(found, Console(file=printed, width=140))
    assert written["message"] in printed.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefixes": (8, 4090)}, "a prefix of 4090 tokens with 3 new ones .* accepted: at most 4096"),
        ({"base": Work(4, 2)}, "a prefix of 2 tokens has no 3 levels; use a longer prefix"),
    ],
)
def test_sizes_that_cannot_be_run(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run_growth(tmp_path / "new", dataclasses.replace(PLAN, **changes), TPGroup(), QUIET)
    assert not (tmp_path / "new").exists()


def test_one_process_only(tmp_path):
    with pytest.raises(InputError, match="in one process, not in 2"):
        run_growth(tmp_path, PLAN, TPGroup(0, 2, "cpu"), QUIET)


def test_the_axes_vary_one_size_each():
    for axis, works in PLAN.axes().items():
        for one, other in pairwise(works):
            assert {n for n in ("batch", "prefix", "depth") if getattr(one, n) != getattr(other, n)} == {axis}
