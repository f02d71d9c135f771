"""Tributary: tensor-parallel inference for Llama-family models with pluggable, exact shared-prefix attention."""

from engine.llm import LLM, CompletionOutput, PromptLevels, RequestOutput
from engine.sampling import SamplingParams

__all__ = ["LLM", "CompletionOutput", "PromptLevels", "RequestOutput", "SamplingParams"]
