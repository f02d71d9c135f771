"""The public API: load a model, give it prompts, get text and tokens."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from engine.attention import get_method
from engine.chat import ChatTemplate, Message
from engine.decode_graphs import check_capturable
from engine.decoding import Generated
from engine.distributed import TPGroup, init_group
from engine.engine import Engine, Levels
from engine.errors import InputError
from engine.generation import OnFailed, OnTokens
from engine.loader import load_model, read_config
from engine.prefill import check_prefill, parse_prefill
from engine.prompt_logprobs import TokenLogprobs
from engine.requests import Request
from engine.sampling import SamplingParams
from engine.stopping import cut_at_stop
from engine.tokenizer import Tokenizer
from kernels import OPERATIONS_BACKENDS, Backend

Prompt = str | Sequence[int]

# A shared stretch shorter than this many tokens costs more in calls than its reading saves.
MIN_SHARED_TOKENS = 16


@dataclass(frozen=True)
class CompletionOutput:
    """One sample."""

    index: int  # which of the prompt's ``n`` samples
    text: str | None  # without special tokens, up to a stop string; None when the model has no tokenizer
    token_ids: tuple[int, ...]  # all that were generated, up to a stop token or the one that completed a stop string
    logprobs: tuple[float, ...] | None  # of each token, natural log; None unless asked for
    # For each token the log-probabilities by id of the likeliest ones, best first, and its own; None unless asked for.
    top_logprobs: tuple[dict[int, float], ...] | None
    finish_reason: str  # "stop" or "length"
    logits: torch.Tensor | None = None  # (tokens, V) float32; None unless asked for


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its samples."""

    prompt: str | None  # the whole text, all ``PromptLevels`` joined; None when it was given as token ids
    prompt_token_ids: Sequence[int]  # likewise; kept levels above it are in neither
    outputs: tuple[CompletionOutput, ...]
    # Of each token of the prompt, natural log, None of the first; and as in ``CompletionOutput.top_logprobs``.
    prompt_logprobs: tuple[float | None, ...] | None = None  # None unless asked for
    prompt_top_logprobs: tuple[dict[int, float] | None, ...] | None = None


# Called with a prompt's number, in the caller's order, and its output.
OnOutput = Callable[[int, RequestOutput], None]


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
        attention_backend: what evaluates attention, see ``kernels.Backend``; None takes the best for each segment.
        operations_backend: what runs the operations around it, one of ``kernels.OPERATIONS_BACKENDS``; None takes the
            best there is.
        cuda_graphs: decode steps are captured and replayed on CUDA, with attention by Triton.
        prefill: how prompts are read, one of ``engine.prefill.PREFILL_METHODS``, with options as in
            ``a_shape:n_init=128:n_local=4096``; None is ``dense``, all of attention.
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
        attention_backend: str | None = None,
        operations_backend: str | None = None,
        cuda_graphs: bool = False,
        prefill: str | None = None,
        seed: int = 0,
        group: TPGroup | None = None,
    ):
        get_method(attention)  # a wrong name shows before the weights are loaded
        if not parse_prefill(prefill).is_dense:
            options = dict(tp_dir=tp_dir, load_format=load_format, dtype=dtype, revision=revision)
            check_prefill(prefill, str(model), read_config(model, **options))
        if attention_backend is not None and attention_backend not in list(Backend):
            raise InputError(f"attention backend {attention_backend!r} is not known; accepted: {', '.join(Backend)}")
        if operations_backend is not None and operations_backend not in OPERATIONS_BACKENDS:
            raise InputError(
                f"operations backend {operations_backend!r} is not known; accepted: {', '.join(OPERATIONS_BACKENDS)}"
            )
        if group is not None and device is not None:
            raise InputError("device and group were both given; the group has its device: leave the device out")
        self.attention = attention
        self.group = group if group is not None else init_group(device)
        try:
            if cuda_graphs:
                check_capturable(self.group, attention_backend)
            loaded = load_model(
                model, self.group, tp_dir=tp_dir, load_format=load_format, dtype=dtype, revision=revision, seed=seed
            )
            self.config = loaded.config
            self._folder = loaded.folder
            has_tokenizer = self._folder is not None and (self._folder / "tokenizer.json").is_file()
            self._tokenizer = Tokenizer.from_folder(self._folder) if has_tokenizer else None
            self.engine = Engine(
                loaded.model,
                eos_token_ids=self.config.eos_token_ids,
                max_batch_size=max_batch_size,
                tokenizer=self._tokenizer,
                attention_backend=attention_backend,
                operations_backend=operations_backend,
                cuda_graphs=cuda_graphs,
                prefill=prefill,
            )
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
        planned_length: int | None = None,
        on_tokens: OnTokens | None = None,
        on_output: OnOutput | None = None,
        on_failed: OnFailed | None = None,
        repeats_differ: bool = True,
    ) -> list[RequestOutput]:
        """For each prompt, in the caller's order, ``params.n`` samples.

        Shared prefixes of ``min_shared`` tokens (``MIN_SHARED_TOKENS`` if not given) or more are found by themselves;
        or they are laid out by hand with ``PromptLevels``. ``on_output`` is called with (the prompt's number, its
        output) as soon as the last of its samples ends. With ``on_failed``, a prompt that alone has no room in memory,
        or whose logits are not finite, is told to it as (its number, what is wrong) and left out of what is returned;
        without it the first one raises. A prompt that can be told to be wrong before anything runs always raises: for
        prompts that come from elsewhere, ask ``check_prompt`` of each. The others are those of ``Engine.generate``.
        """
        laid_out = isinstance(prompts, PromptLevels)
        levels = prompts.levels if laid_out else [prompts]
        top = shared_cache_op == "wipe" or self.engine.num_shared_levels == 0
        if not laid_out and shared_cache_op == "wipe" and any(isinstance(p, str) and not p for p in prompts):
            raise InputError("a prompt is empty text; accepted: text or token ids; fill it, or give it [bos_token_id]")
        encoded = [self._encode(level, special=top and number == 0) for number, level in enumerate(levels)]
        if min_shared is None and top and not laid_out and shared_cache_op != "extend":
            min_shared = MIN_SHARED_TOKENS
        outputs = _Outputs(levels, encoded, prompts.parents if laid_out else None, self._tokenizer, on_output)
        self.engine.generate(
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
            planned_length=planned_length,
            on_tokens=on_tokens,
            on_ended=outputs.add,
            on_failed=on_failed,
            repeats_differ=repeats_differ,
        )
        return outputs.in_order()

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        on_output: OnOutput | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """``generate`` for a conversation, or each of a list of them, laid out by the model's chat template.

        A conversation is a list of messages, ``{"role": "user", "content": "text"}``. Each output's prompt is the text
        that the template made, which by default ends where the answer begins. ``options`` are those of ``generate``.
        Raises InputError when the model has no template, or one that does not take the messages.
        """
        now = self.group.broadcast(datetime.now())  # templates may state it, and ranks must agree on every token
        texts = self._chat_template.render_all(conversations, now, add_generation_prompt=add_generation_prompt)

        outputs: dict[int, RequestOutput] = {}

        def with_text(number: int, output: RequestOutput) -> None:
            outputs[number] = replace(output, prompt=texts[number])
            if on_output is not None:
                on_output(number, outputs[number])

        token_ids = [self._encode_text(text, special=False) for text in texts]
        self.generate(token_ids, params, on_output=with_text, **options)
        return [output for _, output in sorted(outputs.items())]

    def encode(self, prompt: str) -> list[int]:
        """The token ids of one prompt as ``generate`` makes them of text, special tokens included.

        Raises InputError for text that is no Unicode, and when the model came without a tokenizer.
        """
        return self._encode_text(prompt, special=True)

    def encode_chat(self, conversation: Sequence[Message], now: datetime) -> list[int]:
        """The token ids of one conversation up to where the answer begins, as ``chat`` lays it out.

        ``now`` is the time for templates that state it; all ranks must give the same. Raises InputError as ``chat``.
        """
        return self._encode_text(self._chat_template.render(conversation, now), special=False)

    def check_prompt(self, token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises InputError for a prompt that ``generate`` could serve beside no other: an empty one, ids outside the
        vocabulary, more tokens than the model has positions, parameters that do not fit the model."""
        self.engine.check_prompt(token_ids, params)

    def append_shared(
        self,
        prompts: Sequence[Prompt],
        parents: Sequence[int] | None = None,
        *,
        attention: str | None = None,
        planned_length: int | None = None,
    ) -> torch.Tensor:
        """Computes one more shared level and keeps it, see ``Engine.append_shared``. Text gets special tokens, such as
        BOS, at the first level only. ``llm.engine`` truncates and empties what is kept, and sets caches up ahead."""
        encoded = self._encode(prompts, special=self.engine.num_shared_levels == 0)
        return self.engine.append_shared(
            encoded, parents, attention=attention or self.attention, planned_length=planned_length
        )

    def close(self) -> None:
        """Leaves the group. Call it once, last, when this class joined the ranks."""
        self.group.close()

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        if self._folder is None:
            raise InputError("random weights of a preset have no chat template; give prompts as lists of token ids")
        return ChatTemplate.from_folder(self._folder)

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


class _Outputs:
    """The outputs of one call, put together as its sequences end."""

    def __init__(
        self,
        levels: Sequence[Sequence[Prompt]],
        encoded: Sequence[Sequence[Sequence[int]]],
        parents: Sequence[Sequence[int]] | None,
        tokenizer: Tokenizer | None,
        on_output: OnOutput | None,
    ):
        self._levels, self._encoded, self._parents = levels, encoded, parents
        self._tokenizer, self._on_output = tokenizer, on_output
        self._samples: dict[int, dict[int, CompletionOutput]] = defaultdict(dict)
        self._prompt_logprobs: dict[int, TokenLogprobs] = {}  # of prompts that have not finished
        self._finished: dict[int, RequestOutput] = {}

    def add(self, request: Request, generated: Generated) -> None:
        """One sequence has ended."""
        number, samples = request.prompt, self._samples[request.prompt]
        samples[request.sample] = self._sample(request, generated)
        if generated.prompt_logprobs is not None:
            self._prompt_logprobs[number] = generated.prompt_logprobs
        if len(samples) < request.params.n:
            return
        text, ids = (whole[number] for whole in self._prompts)
        of_prompt = self._prompt_logprobs.pop(number, None)
        output = RequestOutput(
            text,
            ids,
            tuple(samples[index] for index in range(request.params.n)),
            None if of_prompt is None else tuple(of_prompt.chosen),
            None if of_prompt is None or of_prompt.top is None else tuple(of_prompt.top),
        )
        self._finished[number] = output
        del self._samples[number]
        if self._on_output is not None:
            self._on_output(number, output)

    def in_order(self) -> list[RequestOutput]:
        return [output for _, output in sorted(self._finished.items())]

    @cached_property
    def _prompts(self) -> tuple[list[str | None], list[Sequence[int]]]:
        """Their texts and their ids. Not before the first sequence has ended: by then the levels are known to fit."""
        owners = Levels(self._levels, self._parents).all_parents()
        return _whole_texts(self._levels, owners), _whole_ids(self._encoded, owners)

    def _sample(self, request: Request, generated: Generated) -> CompletionOutput:
        text = None if self._tokenizer is None else self._tokenizer.decode(generated.token_ids)
        if text is not None:
            text = cut_at_stop(text, request.params.stop, request.params.include_stop_str_in_output)
        return CompletionOutput(
            index=request.sample,
            text=text,
            token_ids=tuple(generated.token_ids),
            logprobs=None if generated.logprobs is None else tuple(generated.logprobs),
            top_logprobs=None if generated.top_logprobs is None else tuple(generated.top_logprobs),
            finish_reason=generated.finish_reason,
            logits=None if generated.logits is None else torch.stack(generated.logits),
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
