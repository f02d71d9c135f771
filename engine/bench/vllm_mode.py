"""vLLM with automatic prefix caching, as the original benchmarks ran it. ``vllm_notok`` leaves out detokenisation."""

import torch

from engine.bench.memory_model import Footprint
from engine.bench.modes import ModelOptions
from engine.bench.results import Cell
from engine.checkpoint import resolve_model
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.loader import read_config


class VLLMMode:
    """vLLM starts its ``tp`` processes by itself."""

    def __init__(self, options: ModelOptions, group: TPGroup, tp: int, detokenize: bool):
        try:
            import vllm
        except ImportError:
            raise InputError(
                "modes vllm and vllm_notok need vLLM, which is not installed; pip install tributary[vllm] on a machine "
                "that vLLM supports"
            ) from None
        self._vllm, self._detokenize = vllm, detokenize
        folder = resolve_model(options.name, options.revision, weights=options.load_format != "dummy")
        self.config = read_config(folder, dtype=options.dtype)
        self.llm = vllm.LLM(
            str(folder),
            tensor_parallel_size=tp,
            dtype=str(self.config.dtype).removeprefix("torch."),
            load_format=options.load_format,
            enable_prefix_caching=True,
            seed=options.seed,
        )

    def footprint(self, cell: Cell) -> Footprint | None:
        return None  # vLLM takes its share of the device when it starts, and runs what does not fit in turns

    def set_up(self, cell: Cell) -> None:
        self._batch_size = cell.batch_size

    def prefill(self, prompt: list[int]) -> None:
        self.llm.reset_prefix_cache()
        self._prompts = [{"prompt_token_ids": prompt}] * self._batch_size
        self._generate(self._prompts[:1], 1)

    def generate(self, num_tokens: int) -> None:
        self._generate(self._prompts, num_tokens)

    def release(self) -> None:
        self.llm.reset_prefix_cache()

    @torch.inference_mode()
    def _generate(self, prompts: list[dict], num_tokens: int) -> None:
        params = self._vllm.SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=self._detokenize
        )
        self.llm.generate(prompts, params, use_tqdm=False)
