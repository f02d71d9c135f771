"""The public API: load a model, give it prompts, get text and tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.attention import get_method
from engine.decoding import Generated
from engine.distributed import TPGroup, init_group
from engine.engine import Engine, Levels, OnTokens
from engine.errors import InputError
from engine.loader import load_model
from engine.sampling import SamplingParams
from engine.tokenizer import Tokenizer

Prompt = str | Sequence[int]

# A shared stretch shorter than this many tokens costs more in calls than its reading saves.
MIN_SHARED_TOKENS = 16


@dataclass(frozen=True)
class CompletionOutput:
    """One sample."""

    index: int  # which of the prompt's ``n`` samples
    text: str | None  # without special tokens; None when the model has no tokenizer
    token_ids: tuple[int, ...]  # a stop token included
    logprobs: tuple[float, ...] | None  # of each token, natural log; None unless asked for
    finish_reason: str  # "stop" or "length"
    logits: torch.Tensor | None = None  # (tokens, V) float32; None unless asked for


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its samples."""

    prompt: str | None  # the whole text, all ``PromptLevels`` joined; None when it was given as token ids
    prompt_token_ids: Sequence[int]  # likewise; kept levels above it are in neither
    outputs: tuple[CompletionOutput, ...]


@dataclass(frozen=True)
class PromptLevels:
    """Prompts laid out by hand, text or token ids, as ``engine.engine.Levels``: roots first, sequences last.

    Special tokens, such as BOS, are added to the text of the first level only.
    """

    levels: Sequence[Sequence[Prompt]]
    parents: Sequence[Sequence[int]] | None = None


class LLM:
    """A model on this rank, and its part of every generation.

    SPMD: every rank makes the same calls and gets the same results. One process needs no launcher; under ``torchrun``
    each process is one rank.

    Args:
        model: a local folder or a Hub id in Hugging Face format; a preset's name with ``load_format="dummy"``.
        tp_dir: shards made by ``tools/make_tp_files.py``, one for each rank.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu``, ``cuda``, ``cuda:N``; None takes CUDA where there is one.
        attention: the default method, see ``engine.attention.METHODS``.
        load_format: ``auto``, or ``dummy`` for random weights.
        revision: of the Hub repository.
        cache_tokens: tokens that the KV cache has room for; None sizes it by the work and the memory.
        max_batch_size: sequences that run at once at most.
        seed: of dummy weights.
        group: the ranks; None joins those that ``torchrun`` started.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tp_dir: str | Path | None = None,
        dtype: str = "auto",
        device: str | None = None,
        attention: str = "hydragen",
        load_format: str = "auto",
        revision: str | None = None,
        cache_tokens: int | None = None,
        max_batch_size: int = 1024,
        seed: int = 0,
        group: TPGroup | None = None,
    ):
        get_method(attention)  # a wrong name shows before the weights are loaded
        if group is not None and device is not None:
            raise InputError("device and group were both given; the group has its device: leave the device out")
        self.attention = attention
        self.group = group if group is not None else init_group(device)
        try:
            loaded = load_model(
                model, self.group, tp_dir=tp_dir, load_format=load_format, dtype=dtype, revision=revision, seed=seed
            )
            self.config = loaded.config
            self._folder = loaded.folder
            has_tokenizer = self._folder is not None and (self._folder / "tokenizer.json").is_file()
            self._tokenizer = Tokenizer.from_folder(self._folder) if has_tokenizer else None
            self.engine = Engine(loaded.model, eos_token_ids=self.config.eos_token_ids, max_batch_size=max_batch_size)
            if cache_tokens is not None:
                self.engine.setup_caches(cache_tokens)
        except BaseException:
            if group is None:
                self.group.close()
            raise

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises InputError when the model came without one."""
        if self._tokenizer is not None:
            return self._tokenizer
        if self._folder is None:
            raise InputError("random weights of a preset have no tokenizer; give prompts as lists of token ids")
        return Tokenizer.from_folder(self._folder)  # which says what the folder has instead

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def generate(
        self,
        prompts: Sequence[Prompt] | PromptLevels,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        attention: str | None = None,
        shared_cache_op: str = "wipe",
        parents: Sequence[int] | None = None,
        disable_hierarchy: bool = False,
        min_shared: int | None = None,
        starting_logits: torch.Tensor | None = None,
        forced_tokens: Sequence[Sequence[int]] | None = None,
        return_logits: bool = False,
        on_tokens: OnTokens | None = None,
    ) -> list[RequestOutput]:
        """For each prompt, in the caller's order, ``params.n`` samples.

        Shared prefixes of ``min_shared`` tokens (``MIN_SHARED_TOKENS`` if not given) or more are found by themselves;
        or they are laid out by hand with ``PromptLevels``. The other arguments are those of ``Engine.generate``.
        """
        laid_out = isinstance(prompts, PromptLevels)
        levels = prompts.levels if laid_out else [prompts]
        if not laid_out and shared_cache_op == "wipe" and any(isinstance(p, str) and not p for p in prompts):
            raise InputError("a prompt is empty text; accepted: text or token ids; fill it, or give it [bos_token_id]")
        top = shared_cache_op == "wipe" or self.engine.num_shared_levels == 0
        encoded = [self._encode(level, special=top and number == 0) for number, level in enumerate(levels)]
        if min_shared is None and top and not laid_out and shared_cache_op != "extend":
            min_shared = MIN_SHARED_TOKENS
        generated = self.engine.generate(
            Levels(encoded, prompts.parents) if laid_out else encoded[0],
            params if params is not None else SamplingParams(),
            attention=attention or self.attention,
            shared_cache_op=shared_cache_op,
            parents=parents,
            disable_hierarchy=disable_hierarchy,
            min_shared=min_shared,
            starting_logits=starting_logits,
            forced_tokens=forced_tokens,
            return_logits=return_logits,
            on_tokens=on_tokens,
        )
        owners = Levels(levels, prompts.parents if laid_out else None).all_parents()
        texts = _whole_texts(levels, owners)
        whole_ids = _whole_ids(encoded, owners)
        return [
            RequestOutput(
                prompt=text,
                prompt_token_ids=ids,
                outputs=tuple(self._output(index, sample) for index, sample in enumerate(samples)),
            )
            for text, ids, samples in zip(texts, whole_ids, generated, strict=True)
        ]

    def append_shared(
        self, prompts: Sequence[Prompt], parents: Sequence[int] | None = None, *, attention: str | None = None
    ) -> torch.Tensor:
        """Computes one more shared level and keeps it, see ``Engine.append_shared``. Text gets special tokens, such as
        BOS, at the first level only. ``llm.engine`` truncates and empties what is kept, and sets caches up ahead."""
        encoded = self._encode(prompts, special=self.engine.num_shared_levels == 0)
        return self.engine.append_shared(encoded, parents, attention=attention or self.attention)

    def close(self) -> None:
        """Leaves the group. Call it once, last, when this class joined the ranks."""
        self.group.close()

    def _encode(self, prompts: Sequence[Prompt], special: bool) -> list[Sequence[int]]:
        if isinstance(prompts, str):
            raise InputError("prompts is one string; accepted: a list of strings or of lists of token ids; put it in")
        return [self._encode_text(p, special) if isinstance(p, str) else p for p in prompts]

    def _encode_text(self, text: str, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # lone surrogates: what Python makes of bytes that are not UTF-8
            raise InputError(f"a prompt is not Unicode text ({error.reason}); accepted: UTF-8; convert it") from None
        return self.tokenizer.encode(text, add_special_tokens=special)

    def _output(self, index: int, sample: Generated) -> CompletionOutput:
        return CompletionOutput(
            index=index,
            text=self.tokenizer.decode(sample.token_ids) if self.has_tokenizer else None,
            token_ids=tuple(sample.token_ids),
            logprobs=None if sample.logprobs is None else tuple(sample.logprobs),
            finish_reason=sample.finish_reason,
            logits=None if sample.logits is None else torch.stack(sample.logits),
        )


def _whole_texts(levels: Sequence[Sequence[Prompt]], parents: Sequence[Sequence[int]]) -> list[str | None]:
    """The text of each sequence from the root down; None where a part of it is token ids."""
    texts = [prompt if isinstance(prompt, str) else None for prompt in levels[0]]
    for level, owners in zip(levels[1:], parents, strict=True):
        above = [texts[owner] for owner in owners]
        both = [isinstance(prompt, str) and text is not None for prompt, text in zip(level, above, strict=True)]
        texts = [text + prompt if ok else None for text, prompt, ok in zip(above, level, both, strict=True)]
    return texts


def _whole_ids(levels: Sequence[Sequence[Sequence[int]]], parents: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The token ids of each sequence from the root down. Those of a single level are the caller's own lists."""
    ids = list(levels[0])
    for level, owners in zip(levels[1:], parents, strict=True):
        ids = [[*ids[owner], *entry] for owner, entry in zip(owners, level, strict=True)]
    return ids
