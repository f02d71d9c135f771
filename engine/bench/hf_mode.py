"""transformers as a good user would run it: the prompt computed once, its cache repeated for the batch and kept.

Attention is sdpa; dtype, threads, prompt and the choice of tokens are those of the other modes.
"""

import torch

from engine.bench.memory_model import Footprint, footprint
from engine.bench.modes import ModelOptions
from engine.bench.results import Cell
from engine.distributed import TPGroup
from engine.dummy import dummy_tensor
from engine.errors import InputError
from engine.loader import find_checkpoint, read_config
from engine.sampling import greedy


class HFMode:
    """A model of the transformers library on one device."""

    def __init__(self, options: ModelOptions, group: TPGroup):
        try:
            import transformers
        except ImportError:
            raise InputError("mode hf needs transformers, which is not installed; pip install tributary[transformers]") from None
        self._transformers = transformers
        transformers.logging.set_verbosity_error()
        self.group = group
        self.config = read_config(
            options.name, load_format=options.load_format, dtype=options.dtype, revision=options.revision
        )
        if options.load_format == "dummy":
            self.model = self._random_model(options.seed)
        else:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                find_checkpoint(options.name, options.revision, 1),
                dtype=self.config.dtype,
                attn_implementation="sdpa",
                local_files_only=True,
            ).to(group.device)
        self.model.eval()

    def _random_model(self, seed: int) -> torch.nn.Module:
        """The same random weights as the engine's."""
        raw = self.config.to_hf()
        hf_config = self._transformers.AutoConfig.for_model(**raw)
        with torch.device(self.group.device):
            model = self._transformers.AutoModelForCausalLM.from_config(
                hf_config, dtype=self.config.dtype, attn_implementation="sdpa"
            )
        for name, parameter in model.named_parameters():
            parameter.data.copy_(dummy_tensor(name, tuple(parameter.shape), self.config.dtype, seed))
        return model

    def footprint(self, cell: Cell) -> Footprint:
        """That of the baseline that shares nothing: the repeated cache is a copy of the prompt for each sequence.

        Growing the cache by a token copies one layer's keys or values of the batch, which comes on top.
        """
        base = footprint(self.config, 1, cell)
        return Footprint(base.weights, base.cache, base.activations + base.cache // (2 * self.config.num_layers))

    def set_up(self, cell: Cell) -> None:
        self._batch_size = cell.batch_size

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> None:
        self._cache = None  # the last one goes before the next one is made
        tokens = torch.tensor([prompt], device=self.group.device)
        out = self.model(tokens, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        self._cache.batch_repeat_interleave(self._batch_size)
        self._logits = out.logits[:, -1].repeat(self._batch_size, 1)

    @torch.inference_mode()
    def generate(self, num_tokens: int) -> None:
        logits = self._logits
        for step in range(num_tokens):
            tokens = greedy(logits, 0, self.group)
            if step == num_tokens - 1:
                break
            logits = self.model(tokens[:, None], past_key_values=self._cache, use_cache=True).logits[:, -1]
        if num_tokens > 1:
            self._cache.crop(-(num_tokens - 1))  # back to the prompt; its keys stay where they are

    def release(self) -> None:
        self._cache = self._logits = None
