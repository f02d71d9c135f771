"""Prompts of random tokens for the small models of ``models``, greedy generation, and a pattern for each head."""

import json
from pathlib import Path

import numpy as np

from engine.sampling import SamplingParams


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """A prompt of each length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 67, n).tolist() for n in lengths]


def generate(engine, given, num_tokens: int = 6, **options) -> list:
    """The greedy continuation of each prompt, with its logits."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return [samples[0] for samples in engine.generate(given, params, return_logits=True, **options)]


def mixed_heads(folder: Path) -> str:
    """A prefill method with a pattern of every kind for the 4 heads of 2 layers."""
    path = folder / "heads.json"
    first = {
        "0": ["vertical_and_slash", 30, 100, 1],
        "1": ["stream_llm", 3, 10, 1],
        "2": ["block_sparse", 2, 0, 1],
        "3": ["dense", 0, 0, 1],
    }
    path.write_text(json.dumps([first, {str(3 - head): first[str(head)] for head in range(4)}]))
    return f"minference:config={path}:dense_below=32"
