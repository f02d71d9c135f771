"""Made-up results of a microbenchmark."""

from engine.bench.micro.micro_results import Row, RowResult
from engine.bench.result_files import Status


def row_result(mode="hydragen", times_ms=(1.0, 1.0, 1.0), operation="", backend="", **changes):
    """A row of ``base`` and ``hydragen`` at one size, or of an operation; sizes and fields are changed by name."""
    sizes = {
        "batch_size": 32, "num_shared": 1024, "num_unique": 64, "num_heads": 8, "num_kv_heads": 1, "head_dim": 128,
    }  # fmt: skip
    sizes |= {name: changes.pop(name) for name in list(changes) if name in sizes}
    sizes["unique_seq_len"] = changes.pop("unique_seq_len", sizes["num_unique"])
    fields = {
        "row": Row(**sizes, mode=mode, method=changes.pop("method", ""), operation=operation, backend=backend),
        "status": Status.OK,
        "seed": 0,
        "environment": {"device": "cpu", "device_name": "a CPU", "dtype": "bfloat16"} | changes.pop("env", {}),
        "num_bytes": 10**7,
        "num_flops": 10**9,
        "predicted_bytes": 10**8,
        "times_ms": tuple(times_ms),
        "num_warmup": 1,
        "run": "a",
        "read_gbs": 40.0,
        "matmul_tflops": 2.0,
        "sweep": "results/a",
    } | changes
    return RowResult(**fields)


def operation_result(name, *times, backend="", backends=(), **changes):
    return row_result("operations", times, name, backend, backends=backends, **changes)


PARTS_OF_A_STEP = [
    operation_result("attention_shared", 4.0, backend="aten", backends=("aten",)),
    operation_result("attention_shared", 2.0, backend="simd", backends=("simd",)),
    operation_result("attention_own", 1.0, backend="simd", backends=("simd",)),
    operation_result("attention_own", 3.0, backend="aten", backends=("aten",)),
    operation_result("merge", 0.5),
]
