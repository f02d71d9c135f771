"""Made-up results of a sweep."""

from engine.bench.results import Cell, CellResult, Status


def result(mode, tokens_per_second=1000.0, batch_size=32, num_shared=1024, num_unique=11, noise=0.0, **changes):
    """A cell whose times come to this throughput, with a first token of 100 ms."""
    environment = {"device_name": "a CPU", "dtype": "bfloat16", "world_size": 2} | changes.pop("env", {})
    fields = {
        "cell": Cell(mode, batch_size, num_shared, num_unique),
        "status": Status.OK,
        "model_name": "llama-125m",
        "seed": 0,
        "num_iters": 3,
        "num_warmup": 1,
        "environment": environment,
        "sweep": "results/a",
    } | changes
    if fields["status"] == Status.OK:
        decode_ms = 100 + (num_unique - 1) * batch_size * 1e3 / tokens_per_second
        fields["decode_ms"] = tuple(decode_ms * scale for scale in (1 - noise, 1, 1 + noise))
        fields["first_token_ms"] = (100.0,)
    return CellResult(**fields)
