import math
from statistics import NormalDist

import pytest

from engine.bench.needles.accuracy import NOTHING_ASKED, Accuracy


@pytest.mark.parametrize(("right", "asked"), [(1, 10), (50, 100), (255, 256), (3.5, 7), (1, 2)])
def test_the_interval_ends_where_the_score_test_rejects(right, asked):
    """Its definition: the shares from which the one found is 1.96 of their standard errors away."""
    limit = NormalDist().inv_cdf(0.975)
    for bound, direction in zip(Accuracy(right, asked).interval, (1, -1), strict=True):
        score = direction * (right / asked - bound) / math.sqrt(bound * (1 - bound) / asked)
        assert score == pytest.approx(limit, rel=1e-5)


def test_all_or_none_are_right():
    z2 = NormalDist().inv_cdf(0.975) ** 2
    assert Accuracy(0, 10).interval == pytest.approx((0, z2 / (10 + z2)))
    assert Accuracy(10, 10).interval == pytest.approx((10 / (10 + z2), 1))


def test_text():
    assert Accuracy(63, 64).text == "98.4% (91.7-99.7)"
    assert NOTHING_ASKED.text == "-"
    assert NOTHING_ASKED.share is None
    assert NOTHING_ASKED.interval == (0.0, 1.0)


def test_sum():
    assert Accuracy(1, 2) + Accuracy(2.5, 3) == Accuracy(3.5, 5)
