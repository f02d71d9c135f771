"""Tributary: tensor-parallel inference for Llama-family models with pluggable, exact shared-prefix attention."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

_kernels = find_spec("kernels")
if _kernels is None or not (Path(_kernels.origin or "").parent / "segment.py").is_file():
    raise ImportError(
        "the package 'kernels' that Python finds is not this project's "
        f"({_kernels.origin if _kernels else 'there is none'}); uninstall the other one (pip uninstall kernels), or "
        "put this project's root first (PYTHONPATH=.)"
    )

_PUBLIC = {
    "LLM": "engine.llm",
    "CompletionOutput": "engine.llm",
    "PromptLevels": "engine.llm",
    "RequestOutput": "engine.llm",
    "SamplingParams": "engine.sampling",
    "get_support_models": "engine.prefill",
    "register_sparse_attention": "engine.hf_attention",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    """The public names, imported on first use: a tool that needs ``engine.x`` alone then loads no more than that."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
