"""Generate completions for prompts: laid out by hand as a hierarchy, or read from a file."""

import json
from pathlib import Path
from typing import Annotated

import typer

from engine import LLM, PromptLevels, RequestOutput, SamplingParams
from engine import cli_options as options
from engine.cli import make_app, make_console, run
from engine.distributed import init_group
from engine.errors import InputError
from engine.files import write_whole
from engine.progress import generation_progress
from engine.prompts import (
    parse_conversations,
    parse_levels,
    read_conversations,
    read_prompts,
)

app = make_app()


@app.command()
def generate(
    model: options.Model,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="One level of the hierarchy, its prompts separated by |. Repeat it for the levels below."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="One prompt a line, or JSON lines (.jsonl); blank lines are skipped. Shared prefixes are found. With "
            '--chat a JSON line may be {"messages": [...]}.'
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each prompt is a user's message, laid out by the model's chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="With --chat: a system message that every conversation begins with.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the completions go, if not to the terminal.")] = None,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="JSON lines rather than text.")] = False,
    # torchrun takes the beginnings of its own options for itself, wherever they stand: --n would be one.
    n: Annotated[
        int, typer.Option("--num-samples", "--n", help="Completions of each prompt; --n only without torchrun.")
    ] = 1,
    max_tokens: Annotated[int, typer.Option(help="New tokens of each completion at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this much probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0 (or -1) for all.")] = 0,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens less probable than this times the likeliest one; 0 for none.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same completions, on any number of ranks.")] = 0,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="A token that ends a completion; repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends a completion, and is left out of it; repeatable.")
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --jsonl: log-probabilities of each token, and of this many of the likeliest, 0 to 20."),
    ] = None,
    prompt_logprobs: Annotated[
        int | None, typer.Option(help="With --jsonl: likewise of each token of the prompt, 0 to 20.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")] = False,
    attention: options.Attention = "hydragen",
    attention_backend: options.AttentionBackend = None,
    operations_backend: options.OperationsBackend = None,
    cuda_graphs: options.CudaGraphs = False,
    prefill: options.Prefill = None,
    disable_hierarchy: Annotated[bool, typer.Option("--disable-hierarchy", help="Share the first level only.")] = False,
    tp_dir: options.TpDir = None,
    load_format: options.LoadFormat = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    revision: options.Revision = None,
    cache_tokens: options.CacheTokens = None,
    max_batch_size: options.MaxBatchSize = 1024,
    timeout: options.Timeout = 600,
) -> None:
    """Generate completions. Prompts that begin alike share what they have in common: it is computed and read once.

    Levels divide evenly: with 1 prompt at the first, 2 at the second and 6 at the third level, each of the second has
    3 of the third below it, and there are 6 completions (times --num-samples).

    \b
    Examples:
      python scripts/run.py path/to/model --prompts "Harry Potter is" --num-samples 4 --max-tokens 32
      python scripts/run.py path/to/model --prompts "A story. " --prompts "Once |Never " --prompts "I|you|he|she"
      python scripts/run.py path/to/model --prompt-file questions.txt --jsonl --output answers.jsonl --temperature 0
      python scripts/run.py path/to/model --chat --system "Be brief." --prompts "Who was Ada Lovelace?|What is 6 x 7?"
      torchrun --standalone --nproc_per_node=2 scripts/run.py path/to/model --tp-dir shards --prompt-file questions.txt
    """
    if (prompts is None) == (prompt_file is None):
        raise InputError("give prompts in one way: either --prompts, once for each level, or --prompt-file")
    if system is not None and not chat:
        raise InputError("--system gives a system message, which only a conversation has; add --chat, or leave it out")
    for option, count in (("--logprobs", logprobs), ("--prompt-logprobs", prompt_logprobs)):
        if count is not None and not jsonl:
            raise InputError(f"{option} {count} has no place in text; add --jsonl, or leave it out")
    if output is not None:
        _check_output(output)
    params = SamplingParams(
        n=n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        max_tokens=max_tokens,
        seed=seed,
        stop_token_ids=tuple(stop_token_id or ()),
        stop=tuple(stop or ()),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        ignore_eos=ignore_eos,
    )
    if chat:
        given = read_conversations(prompt_file, system) if prompts is None else parse_conversations(prompts, system)
    else:
        given = read_prompts(prompt_file) if prompts is None else parse_levels(prompts)
    group = init_group(device, timeout_s=timeout)
    try:
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
        num_prompts = len(given.levels[-1] if isinstance(given, PromptLevels) else given)
        with generation_progress(num_prompts * n, make_console(stderr=True, quiet=group.rank != 0)) as on_tokens:
            generate = llm.chat if chat else llm.generate
            results = generate(given, params, disable_hierarchy=disable_hierarchy, on_tokens=on_tokens)
        text = "".join(map(_as_json if jsonl else _as_text, results))
        group.on_rank_0(lambda: print(text, end="") if output is None else write_whole(output, text.encode()))
    finally:
        group.close()


def _check_output(path: Path) -> None:
    """Before the work is done, not after."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"--output {path}: accepted: a file in a directory that exists; make it, or use another path")


def _as_json(result: RequestOutput) -> str:
    outputs = []
    for o in result.outputs:
        record = {"text": o.text, "token_ids": o.token_ids, "finish_reason": o.finish_reason}
        outputs.append(record | _given(logprobs=o.logprobs, top_logprobs=o.top_logprobs))
    prompt = result.prompt if result.prompt is not None else list(result.prompt_token_ids)
    of_prompt = _given(prompt_logprobs=result.prompt_logprobs, prompt_top_logprobs=result.prompt_top_logprobs)
    return json.dumps({"prompt": prompt, **of_prompt, "outputs": outputs}, ensure_ascii=False) + "\n"


def _given(**values: object) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}


def _as_text(result: RequestOutput) -> str:
    prompt = result.prompt if result.prompt is not None else f"[{len(result.prompt_token_ids)} tokens]"
    samples = [o.text if o.text is not None else " ".join(map(str, o.token_ids)) for o in result.outputs]
    return "".join(f"--- {prompt}\n{sample}\n" for sample in samples)


if __name__ == "__main__":
    run(app)
