"""Options that several commands have, with what ``--help`` says of them. A command gives the default."""

from pathlib import Path
from typing import Annotated

import typer

from engine.attention import METHODS
from engine.prefill import PREFILL_METHODS
from kernels import OPERATIONS_BACKENDS, Backend

Attention = Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")]
AttentionBackend = Annotated[
    str | None, typer.Option(help=f"What evaluates attention: {', '.join(Backend)}. Without it: the best there is.")
]
CacheTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens that the KV cache has room for. Without it: what the work needs.")
]
CudaGraphs = Annotated[
    bool, typer.Option("--cuda-graphs", help="Capture decode steps on CUDA and replay them, with attention by Triton.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. CUDA where there is one.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
LoadFormat = Annotated[str, typer.Option(help="auto, or dummy for random weights.")]
MaxBatchSize = Annotated[int, typer.Option(min=1, help="Completions that run at once at most.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder or a Hub id, in Hugging Face format.")]
_OPERATIONS_BACKENDS = ", ".join(OPERATIONS_BACKENDS)
OperationsBackend = Annotated[
    str | None,
    typer.Option(help=f"What runs the operations around it: {_OPERATIONS_BACKENDS}. Without it: the best there is."),
]
Prefill = Annotated[
    str | None,
    typer.Option(
        help=f"How prompts are read: {', '.join(PREFILL_METHODS)}, with options as in a_shape:n_init=128:n_local=4096. "
        "Without it: dense, all of attention."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")]
SeedOfDummies = Annotated[int, typer.Option(min=0, help="Of the prompt, and of dummy weights.")]
Timeout = Annotated[float, typer.Option(min=1, help="Seconds for which a rank waits for another.")]
TpDir = Annotated[Path | None, typer.Option(help="Shards made by tools/make_tp_files.py, one for a rank.")]
