"""A program that uses the engine, on which rank 1 raises in the middle of generation."""

import typer

from engine import LLM, SamplingParams
from engine.cli import make_app, run
from engine.distributed import init_group

app = make_app()


@app.command()
def generate() -> None:
    group = init_group("cpu")
    calls = []

    def on_tokens(*_) -> None:
        calls.append(1)
        if group.rank == 1 and len(calls) == 50:
            raise RuntimeError("the callback broke\nand says more")

    try:
        llm = LLM("tiny", load_format="dummy", group=group)
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2000, ignore_eos=True), on_tokens=on_tokens)
        typer.echo("it was not to come to this")
    finally:
        group.close()


if __name__ == "__main__":
    run(app)
