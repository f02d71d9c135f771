"""transformers as a good user would run it: the prompt computed once, its cache repeated for the batch and kept.

Attention is sdpa; dtype, threads, prompt and the choice of tokens are those of the other modes. The cache is the
library's default, which grows with every step (mode ``hf``), or its ``StaticCache``, which has room for all tokens and
is written in place (mode ``hf_static``).

Shapes: B sequences, V vocabulary.
"""

from pathlib import Path

import torch
import transformers

from engine.bench.modes import ModelOptions
from engine.bench.results import Cell
from engine.checkpoint import Checkpoint, check_weights
from engine.config import ModelConfig
from engine.distributed import TPGroup
from engine.dummy import dummy_tensor
from engine.loader import find_checkpoint
from engine.sampling import greedy


class HFMode:
    """A model of the transformers library on one device."""

    def __init__(self, options: ModelOptions, group: TPGroup, static: bool = False):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()  # the sweep shows its own
        self._group, self._static = group, static
        config = options.config()
        if options.load_format == "dummy":
            self.model = _random_model(config, options.seed, group.device)
        else:
            self.model = _load(find_checkpoint(options.name, options.revision, 1), config).to(group.device)
        self.model.eval()
        self._batch_size, self._num_shared, self._num_unique = 0, 0, 0
        self._cache: transformers.Cache | None = None
        self._logits_BV: torch.Tensor | None = None  # after the prompt

    def set_up(self, cell: Cell) -> None:
        self._batch_size, self._num_unique = cell.batch_size, cell.num_unique

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> None:
        self._cache = None  # the last one goes before the next one is made
        tokens = torch.tensor([prompt], device=self._group.device)
        out = self.model(tokens, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        if self._static:
            room = len(prompt) + self._num_unique - 1  # the last token is never read again
            self._cache = transformers.StaticCache(config=self.model.config, max_cache_len=room)
            for layer, computed in zip(self._cache.layers, out.past_key_values.layers, strict=True):
                layer.update(*(x.expand(self._batch_size, -1, -1, -1) for x in (computed.keys, computed.values)))
        else:
            self._cache.batch_repeat_interleave(self._batch_size)
        self._num_shared = len(prompt)
        self._logits_BV = out.logits[:, -1].repeat(self._batch_size, 1)

    @torch.inference_mode()
    def generate(self, num_tokens: int) -> None:
        logits_BV = self._logits_BV
        for step in range(num_tokens):
            tokens_B = greedy(logits_BV, 0, self._group)
            if step == num_tokens - 1:
                break
            out = self.model(tokens_B[:, None], past_key_values=self._cache, use_cache=True)
            logits_BV = out.logits[:, -1]
        if num_tokens > 1:  # back to the prompt; its keys stay where they are
            if self._static:
                _rewind(self._cache, self._num_shared)
            else:
                self._cache.crop(-(num_tokens - 1))

    def choice(self) -> None:
        return None

    def release(self) -> None:
        self._cache = self._logits_BV = None


def _rewind(cache: transformers.StaticCache, length: int) -> None:
    """Back to the first ``length`` tokens; the library can only go back to none."""
    for layer in cache.layers:
        layer.keys[:, :, length:] = 0  # some versions count what is filled
        layer.values[:, :, length:] = 0
        if hasattr(layer, "cumulative_length"):  # others keep the number
            layer.cumulative_length.fill_(length)


def _load(folder: Path, config: ModelConfig) -> transformers.PreTrainedModel:
    """Raises InputError, as the engine does, for weights that are missing or do not belong to the config."""
    with Checkpoint(folder) as checkpoint:
        check_weights(checkpoint, config)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=config.dtype, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
    )


def _random_model(config: ModelConfig, seed: int, device: torch.device) -> transformers.PreTrainedModel:
    """A model with the same random weights as the engine's."""
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config.to_hf()), dtype=config.dtype, attn_implementation="sdpa"
        )
    for name, parameter in model.named_parameters():
        parameter.data.copy_(dummy_tensor(name, tuple(parameter.shape), config.dtype, seed))
    return model
