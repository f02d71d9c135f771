import pytest
from rows import PARTS_OF_A_STEP, operation_result

from engine.bench.micro.operation_findings import base_over_read, hydragen_over_parts


def test_a_kernel_that_merges_itself_has_two_parts():
    found, what = hydragen_over_parts([operation_result("hydragen", 3.3, backends=("aten", "simd")), *PARTS_OF_A_STEP])
    assert found.value == pytest.approx(1.1)
    assert what == "attention_shared simd + attention_own simd"


def test_one_that_does_not_has_three():
    found, what = hydragen_over_parts([operation_result("hydragen", 7.0, backends=("simd", "aten")), *PARTS_OF_A_STEP])
    assert found.value == pytest.approx(2)
    assert what == "attention_shared simd + attention_own simd + merge"


def test_nothing_to_say_without_all_of_them():
    whole = operation_result("hydragen", 3.0, backends=("simd", "simd"))
    assert hydragen_over_parts(PARTS_OF_A_STEP) is None
    assert hydragen_over_parts([whole, *PARTS_OF_A_STEP[:2]]) is None
    assert hydragen_over_parts([whole]) is None


def test_base_against_what_memory_gave():
    # 10^9 bytes in 40 ms beside 5 x 10^8 in 10 ms: half the rate.
    base = operation_result("base", 40.0, num_bytes=10**9)
    read = operation_result("memory_read", 10.0, num_bytes=5 * 10**8)
    assert base_over_read([base, read]).value == pytest.approx(0.5)
    assert base_over_read([base]) is None
