"""What a sweep can time: the engine's attention methods, and other systems beside them.

A mode loads its model once, then for each cell takes the memory, computes the shared prompt, and generates below it as
often as it is asked. Every mode chooses tokens greedily from the same prompt.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.attention import METHODS
from engine.bench.memory_model import Footprint
from engine.bench.results import Cell
from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.errors import InputError

EXTERNAL_MODES = ("hf", "vllm", "vllm_notok")
MODES = (*METHODS, *EXTERNAL_MODES)


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    name: str
    tp_dir: Path | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    seed: int = 0  # of dummy weights and of the prompt


class Mode(Protocol):
    """One system with a loaded model."""

    config: ModelConfig  # its dtype is the one that the mode runs in

    def footprint(self, cell: Cell) -> Footprint | None:
        """Bytes that each rank needs for the cell; None where this mode does not know."""

    def set_up(self, cell: Cell) -> None:
        """Takes the memory of a cell. Raises InputError or an out-of-memory error when there is not enough."""

    def prefill(self, prompt: list[int]) -> None:
        """Computes the shared prompt, from nothing."""

    def generate(self, num_tokens: int) -> None:
        """Generates ``num_tokens`` tokens for each sequence of the cell, below the prompt of the last ``prefill``."""

    def release(self) -> None:
        """Gives the cell's memory back."""


def check_mode(name: str) -> None:
    if name not in MODES:
        raise InputError(f"mode {name!r} is not known; accepted: {', '.join(MODES)}")


def make_mode(name: str, options: ModelOptions, group: TPGroup, tp: int) -> Mode:
    """Loads the model for a mode. Raises InputError for options that the mode has no use for."""
    check_mode(name)
    if name in METHODS:
        from engine.bench.engine_mode import EngineMode

        return EngineMode(name, options, group)
    if options.tp_dir is not None:
        raise InputError(f"--tp-dir was given, but mode {name} does not read shards; leave it out, or use {METHODS}")
    if group.size > 1:
        raise InputError(f"mode {name} runs in one process, not in {group.size}; start it with python, not torchrun")
    if name == "hf":
        from engine.bench.hf_mode import HFMode

        return HFMode(options, group)
    from engine.bench.vllm_mode import VLLMMode

    return VLLMMode(options, group, tp, detokenize=name == "vllm")


def make_prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    """``length`` random token ids, the same for every mode and rank."""
    return np.random.default_rng(seed).integers(0, vocab_size, length).tolist()
