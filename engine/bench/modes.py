"""What a sweep can time: the engine's attention methods, and other systems beside them.

A mode loads its model once, then for each cell takes the memory, computes the shared prompt, and generates below it as
often as it is asked. Every mode chooses tokens greedily from the same prompt.
"""

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.attention import METHODS
from engine.bench.environment import Execution
from engine.bench.results import Cell
from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.loader import load_model, read_config
from engine.model import Transformer

# Other systems, and the library that each needs; the extra that installs it has the library's name.
EXTERNAL_MODES = {"hf": "transformers", "hf_static": "transformers", "vllm": "vllm", "vllm_notok": "vllm"}
HF_MODES = ("hf", "hf_static")
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

    def config(self) -> ModelConfig:
        """That of the model, in the dtype that every mode runs it in; no weights are read or downloaded."""
        return read_config(
            self.name, tp_dir=self.tp_dir, load_format=self.load_format, dtype=self.dtype, revision=self.revision
        )

    def load(self, group: TPGroup) -> Transformer:
        """This rank's part of the model."""
        return load_model(
            self.name,
            group,
            tp_dir=self.tp_dir,
            load_format=self.load_format,
            dtype=self.dtype,
            revision=self.revision,
            seed=self.seed,
        ).model


class Mode(Protocol):
    """One system with a loaded model."""

    def set_up(self, cell: Cell) -> None:
        """Takes the memory of a cell. Raises InputError or an out-of-memory error when there is not enough."""

    def prefill(self, prompt: list[int]) -> None:
        """Computes the shared prompt, from nothing."""

    def generate(self, num_tokens: int) -> None:
        """Generates ``num_tokens`` tokens for each sequence of the cell, below the prompt of the last ``prefill``."""

    def choice(self) -> str | None:
        """How the shared prompt is read, ``shared`` or ``unshared``, by a mode that chooses; None by others."""

    def release(self) -> None:
        """Gives the cell's memory back."""


def check_mode(
    name: str,
    options: ModelOptions,
    num_ranks: int,
    tp: int | None,
    dry_run: bool = False,
    execution: Execution = Execution(),
) -> None:
    """Raises InputError for a mode that is unknown or not installed, and for options that it has no use for.

    ``tp`` is the tensor-parallel size that was asked for: how many processes vLLM starts, or how many ranks a dry run
    is to plan for. Otherwise ranks are what ``torchrun`` started.
    """
    if name not in MODES:
        raise InputError(f"mode {name!r} is not known; accepted: {', '.join(MODES)}")
    if name in METHODS:
        if not dry_run and tp not in (None, num_ranks):
            raise InputError(
                f"--tp {tp} was given to {num_ranks} rank(s); mode {name} has as many as torchrun starts: use "
                f"torchrun --standalone --nproc_per_node={tp}, and leave --tp out"
            )
        return
    library = EXTERNAL_MODES[name]
    for option, value in asdict(execution).items():
        if value:
            raise InputError(
                f"--{option.replace('_', '-')} was given, but mode {name} is another system; leave it out, or use mode "
                f"{', '.join(METHODS)}"
            )
    if options.tp_dir is not None:
        raise InputError(
            f"--tp-dir {options.tp_dir} was given, but mode {name} reads no shards; leave it out, or use mode "
            f"{', '.join(METHODS)}"
        )
    if num_ranks > 1:
        raise InputError(f"mode {name} is started once, not on {num_ranks} ranks; use python instead of torchrun")
    if name in HF_MODES and tp not in (None, 1):
        raise InputError(f"--tp {tp} was given, but mode {name} runs in one process; leave it out")
    if find_spec(library) is None:
        raise InputError(
            f"mode {name} needs {library}, which is not installed; run in the repository's root: "
            f'pip install -e ".[{library}]"'
        )


def make_mode(
    name: str,
    options: ModelOptions,
    group: TPGroup,
    tp: int | None,
    max_batch_size: int,
    execution: Execution = Execution(),
) -> Mode:
    """Loads the model for a mode that has passed ``check_mode``; its cells have ``max_batch_size`` at most."""
    if name in METHODS:
        from engine.bench.engine_mode import EngineMode

        return EngineMode(name, options.load(group), execution)
    if name in HF_MODES:
        from engine.bench.hf_mode import HFMode

        return HFMode(options, group, static=name == "hf_static")
    from engine.bench.vllm_mode import VLLMMode

    return VLLMMode(options, tp or 1, max_batch_size, detokenize=name == "vllm")


def make_prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    """``length`` random token ids, the same for every mode and rank."""
    return np.random.default_rng(seed).integers(0, vocab_size, length).tolist()
