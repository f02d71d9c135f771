"""Answer a file of requests in the shape of OpenAI's batch API."""

from pathlib import Path
from typing import Annotated

import typer

from engine import LLM
from engine import cli_options as options
from engine.batch.job import BatchJob
from engine.batch.report import batch_progress, print_tally
from engine.batch.request import Defaults
from engine.batch.window import WindowSize
from engine.cli import make_app, make_console, run
from engine.distributed import init_group
from engine.errors import InputError

app = make_app()


@app.command()
def run_batch(
    model: options.Model,
    requests: Annotated[Path, typer.Argument(metavar="INPUT", help="JSON lines, a request each.")],
    results: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Gets a JSON line for each request, as soon as it is answered.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Drop what OUTPUT holds, and begin anew.")] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Of requests without one: each draws by this seed and its custom_id.")
    ] = 0,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="New tokens at most of a chat request that does not say; of others it is 16.")
    ] = 1024,
    window_requests: Annotated[
        int, typer.Option(min=1, help="Requests that are read and run together at most. More share more.")
    ] = 16384,
    window_mib: Annotated[
        int, typer.Option(min=1, help="Memory in MiB that these may take at most, beside the KV cache, roughly.")
    ] = 1024,
    attention: options.Attention = "hydragen",
    attention_backend: options.AttentionBackend = None,
    operations_backend: options.OperationsBackend = None,
    cuda_graphs: options.CudaGraphs = False,
    prefill: options.Prefill = None,
    tp_dir: options.TpDir = None,
    load_format: options.LoadFormat = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    revision: options.Revision = None,
    cache_tokens: options.CacheTokens = None,
    max_batch_size: options.MaxBatchSize = 1024,
    timeout: options.Timeout = 600,
) -> None:
    """Answer a file of requests in the shape of OpenAI's batch API. Shared prefixes are found.

    A line of INPUT is {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "..."}}, or has
    the url /v1/chat/completions and "messages". docs/batch-files.md lists the fields. A request that cannot be served
    is answered with status 400 and what is wrong, and the others go on. The same command goes on where one was stopped,
    by whatever: lines of INPUT that OUTPUT answers are not run again.

    \b
    Examples:
      python scripts/run_batch.py path/to/model requests.jsonl results.jsonl
      python scripts/run_batch.py path/to/model requests.jsonl results.jsonl --overwrite --seed 7 --max-tokens 256
      torchrun --standalone --nproc_per_node=2 scripts/run_batch.py path/to/model requests.jsonl results.jsonl \\
          --tp-dir shards
    """
    group = init_group(device, timeout_s=timeout)
    try:
        job = BatchJob(
            requests,
            results,
            group,
            overwrite=overwrite,
            defaults=Defaults(seed, max_tokens),
            window=WindowSize(window_requests, window_mib << 20),
        )
        with job:
            if not job.is_done:  # loading a model may take long
                llm = LLM(
                    model,
                    tp_dir=tp_dir,
                    dtype=dtype,
                    attention=attention,
                    attention_backend=attention_backend,
                    operations_backend=operations_backend,
                    cuda_graphs=cuda_graphs,
                    prefill=prefill,
                    load_format=load_format,
                    revision=revision,
                    cache_tokens=cache_tokens,
                    max_batch_size=max_batch_size,
                    group=group,
                )
                with batch_progress(job.tally, make_console(stderr=True, quiet=group.rank != 0)) as on_progress:
                    job.run(llm, model, on_progress)
        print_tally(job.tally, make_console(quiet=group.rank != 0))
        if job.tally.num_unserved:
            raise InputError(
                f"{job.tally.num_unserved} requests could not be answered and have no result; the first, "
                f"{job.tally.first_unserved}; the same command runs them again"
            )
    finally:
        group.close()


if __name__ == "__main__":
    run(app)
