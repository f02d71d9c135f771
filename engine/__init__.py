"""Tributary: tensor-parallel inference for Llama-family models with pluggable, exact shared-prefix attention."""

from importlib import import_module

_PUBLIC = {
    "LLM": "engine.llm",
    "CompletionOutput": "engine.llm",
    "PromptLevels": "engine.llm",
    "RequestOutput": "engine.llm",
    "SamplingParams": "engine.sampling",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    """The public names, imported on first use: a tool that needs ``engine.x`` alone then loads no more than that."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
