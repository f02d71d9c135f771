import tracemalloc
from bisect import bisect_left

import pytest
from batches import completion, write_batch

from engine.batch.input_file import InputFile
from engine.batch.ledger import Ledger
from engine.batch.request import Defaults, Origin
from engine.batch.window import WindowSize, windows


@pytest.fixture
def cut(tmp_path):
    def write_and_cut(*lines, answered=(), max_positions=100, **size) -> list[tuple[list[int], list[int]]]:
        """Of each window the numbers of its requests' lines, and of those that are refused."""
        file, ledger = InputFile(write_batch(tmp_path / "in.jsonl", *lines)), Ledger()
        for line, custom_id in answered:
            ledger.add_answered(Origin(line, "req_", custom_id))
        found = windows(file, ledger, Defaults(), WindowSize(**size), max_positions)
        return [([r.origin.line for r in w.requests], [origin.line for origin, _ in w.refused]) for w in found]

    return write_and_cut


def requests(count: int, **body) -> list[dict]:
    return [completion(f"r{i}", **{"prompt": "x"} | body) for i in range(count)]


def test_by_number(cut):
    assert cut(*requests(5), num_requests=2) == [([1, 2], []), ([3, 4], []), ([5], [])]
    assert cut(*requests(4), num_requests=4) == [([1, 2, 3, 4], [])]
    assert cut(b"no", *requests(2), b"no", b"no", num_requests=2) == [([2], [1]), ([3], [4]), ([], [5])]
    assert cut() == []


def test_by_memory(cut):
    assert cut(*requests(3), num_bytes=1) == [([1], []), ([2], []), ([3], [])]
    one_kib = b"x" * 1024
    assert cut(one_kib, one_kib, one_kib, num_bytes=2 * 4 * 1024) == [([], [1, 2]), ([], [3])]


def test_answers_count_by_what_they_may_come_to(cut):
    def least(**body) -> int:
        """Bytes of a window that holds two such requests."""
        return bisect_left(range(10**6), 1, key=lambda size: len(cut(*requests(2, **body), num_bytes=size)) == 1)

    for body in ({"n": 2}, {"max_tokens": 90}, {"logprobs": 5}, {"prompt": ["x", "x"]}):
        assert least(**body) > least() + 2000
    assert least(logprobs=0, echo=True) > least(logprobs=0) + 2000
    assert least(max_tokens=10**6) - least(max_tokens=100) < 300  # beyond the model's positions there are no tokens


def test_answered_lines_are_in_none(cut):
    assert cut(*requests(4), answered=[(1, "r0"), (3, "r2")]) == [([2, 4], [])]
    assert cut(*requests(2), answered=[(1, "r0"), (2, "r1")]) == []


def test_a_custom_id_is_that_of_one_line(cut):
    lines = [*requests(2), completion("r0", "y"), {"custom_id": "r1"}, {"custom_id": "r2"}, *requests(3)[2:]]
    assert cut(*lines) == [([1, 2], [3, 4, 5, 6])]
    # The same in a run that goes on, whichever of them had been answered.
    assert cut(*lines, answered=[(1, "r0"), (6, "r2")]) == [([2], [3, 4, 5])]
    assert cut(*lines, answered=[(3, "r0"), (6, "r2")]) == [([1, 2], [4, 5])]


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(count: int) -> int:
        path = write_batch(tmp_path / "in.jsonl", *requests(count, prompt="x" * 2000))
        tracemalloc.start()
        try:
            for _ in windows(InputFile(path), Ledger(), Defaults(), WindowSize(num_requests=20), 100):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(2000) < peak(200) + 500_000  # of 4 MB
