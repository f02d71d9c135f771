from dataclasses import replace

import pytest
from rows import row_result

from engine.bench.micro.micro_ratio import ratio
from engine.bench.result_files import Status


def test_of_one_run_by_rounds():
    # The machine slows down to half its speed, for both alike.
    base, hydragen = row_result("base", (4, 4, 8, 8, 8)), row_result("hydragen", (1, 1, 2, 2, 2))
    found = ratio([base], [hydragen])
    assert (found.value, found.spread, found.same_run, found.text) == (4, 0, True, "4.00")
    found = ratio([row_result("base", (4, 8, 12))], [row_result("hydragen", (1, 1, 1))])
    assert (found.value, found.high_spread, found.text) == (8, True, "8.00 !")
    assert found.spread == pytest.approx((10.4 - 5.6) / 8)


def test_of_separate_runs_by_medians_and_both_spreads():
    base, hydragen = row_result("base", (4, 8, 12), run="a"), row_result("hydragen", (1, 2, 3), run="b")
    found = ratio([base], [hydragen])
    assert (found.value, found.same_run, found.text) == (4, False, "~4.00 !")
    assert found.spread == pytest.approx((0.6**2 + 0.6**2) ** 0.5)
    assert not ratio([base], [replace(hydragen, run="a", times_ms=(2.0,))]).same_run  # rounds that do not pair


def test_of_a_single_round():
    found = ratio([row_result(times_ms=(3,))], [row_result(times_ms=(2,))])
    assert (found.value, found.spread, found.text) == (1.5, None, "1.50")


def test_of_sums():
    found = ratio([row_result(times_ms=(6, 8))], [row_result(times_ms=(1, 2)), row_result(times_ms=(2, 2))])
    assert found.value == 2


def test_of_what_has_no_times():
    failed = row_result(times_ms=(), status=Status.OUT_OF_MEMORY)
    assert ratio([failed], [row_result()]) is None
    assert ratio([], [row_result()]) is None
    assert ratio([row_result()], [row_result(times_ms=(0.0, 0.0))]) is None
