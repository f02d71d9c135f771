"""vLLM with automatic prefix caching, as the original benchmarks ran it. ``vllm_notok`` leaves out detokenisation."""

import vllm

from engine.bench.modes import ModelOptions
from engine.bench.results import Cell
from engine.checkpoint import resolve_model


class VLLMMode:
    """vLLM starts its ``tp`` processes by itself, and runs up to ``max_batch_size`` sequences at once."""

    def __init__(self, options: ModelOptions, tp: int, max_batch_size: int, detokenize: bool):
        self._detokenize = detokenize
        self._batch_size = 0
        self._prompts: list[dict] = []
        self._llm = vllm.LLM(
            str(resolve_model(options.name, options.revision, weights=options.load_format != "dummy")),
            tensor_parallel_size=tp,
            dtype=str(options.config().dtype).removeprefix("torch."),
            load_format=options.load_format,
            enable_prefix_caching=True,
            max_num_seqs=max_batch_size,  # its default would run a larger batch in turns
            seed=options.seed,
        )

    def set_up(self, cell: Cell) -> None:
        self._batch_size = cell.batch_size

    def prefill(self, prompt: list[int]) -> None:
        self._llm.reset_prefix_cache()
        self._prompts = [{"prompt_token_ids": prompt}] * self._batch_size
        self._generate(self._prompts[:1], 1)

    def generate(self, num_tokens: int) -> None:
        self._generate(self._prompts, num_tokens)

    def choice(self) -> None:
        return None

    def release(self) -> None:
        self._llm.reset_prefix_cache()

    def _generate(self, prompts: list[dict], num_tokens: int) -> None:
        params = vllm.SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=self._detokenize
        )
        self._llm.generate(prompts, params, use_tqdm=False)
