"""/v1/completions: one prompt or several, as text or token ids."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from engine.batch.endpoint import EncodedPrompt, answer, check_params, choice, require_tokenizer
from engine.batch.fields import Fields, is_token_ids
from engine.batch.logprobs import ScoredText, completion_logprobs
from engine.batch.refusal import refused
from engine.batch.sampling_fields import MAX_CHOICES, NEUTRAL, derived_seed, take_params
from engine.batch.token_texts import TokenTexts
from engine.llm import LLM, CompletionOutput, RequestOutput
from engine.sampling import MAX_LOGPROBS, SamplingParams

URL = "/v1/completions"
_MAX_TOKENS = 16  # OpenAI's default
_NEUTRAL = NEUTRAL | {"suffix": ("",), "add_special_tokens": (True,)}


@dataclass(frozen=True)
class CompletionBody:
    """See ``engine.batch.endpoint.Body``. Samples of the first prompt come first, then those of the second."""

    model: str | None
    prompts: tuple[str | Sequence[int], ...]
    params: SamplingParams
    echo: bool  # the prompt is a part of what is returned
    prompt_only: bool  # and all of it: of what the engine generates, one token at least, nothing is
    return_token_ids: bool

    @classmethod
    def parse(cls, fields: Fields, seed: int) -> "CompletionBody":
        """``seed`` is for a request that names none. Raises RefusedError for a body that cannot be used."""
        prompts, echo = _prompts(fields.take("prompt")), fields.boolean("echo", False)
        max_tokens = fields.integer("max_tokens", _MAX_TOKENS, least=0 if echo else 1)
        logprobs = fields.integer("logprobs", most=MAX_LOGPROBS)
        params = take_params(fields, seed=seed, max_tokens=max(max_tokens, 1), logprobs=logprobs)
        if echo:
            params = replace(params, prompt_logprobs=logprobs)
        if len(prompts) * params.n > MAX_CHOICES:
            raise refused("n", params.n, f"up to {MAX_CHOICES} samples, those of all {len(prompts)} prompts together")
        if (best_of := fields.integer("best_of", params.n, least=1)) != params.n:
            raise refused("best_of", best_of, f"n, {params.n}, as all samples are returned")
        model, return_token_ids = fields.text("model"), fields.boolean("return_token_ids", False)
        fields.finish(_NEUTRAL)
        return cls(model, prompts, params, echo, max_tokens == 0, return_token_ids)

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    def encode(self, llm: LLM, now: datetime) -> list[EncodedPrompt]:
        check_params(self.params, llm)
        if self.echo:
            require_tokenizer(llm, "echo")
        encoded = []
        for number, prompt in enumerate(self.prompts):
            ids = array("I", llm.encode(prompt)) if isinstance(prompt, str) else prompt
            # A prompt that is there twice is meant to get other samples the second time.
            seed = derived_seed(self.params.seed, number) if number else self.params.seed
            encoded.append(EncodedPrompt(ids, replace(self.params, seed=seed)))
        return encoded

    def answer(
        self, request_id: str, model: str, outputs: Sequence[RequestOutput], texts: TokenTexts | None
    ) -> dict[str, Any]:
        if self.prompt_only:
            outputs = [_without_tokens(output) for output in outputs]
        choices = []
        for prompt, output in zip(self.prompts, outputs, strict=True):
            before = texts.whole(prompt) if self.echo else ""
            for sample in output.outputs:
                text = None if sample.text is None else before + sample.text
                logprobs = None if sample.logprobs is None else _logprobs(output, before, sample, texts)
                choices.append(choice(len(choices), sample, {"text": text}, logprobs, self.return_token_ids))
        return answer(f"cmpl-{request_id}", "text_completion", model, choices, outputs)


def _without_tokens(output: RequestOutput) -> RequestOutput:
    """The output of a request for no new tokens."""
    samples = []
    for sample in output.outputs:
        logprobs, top_logprobs = (None if value is None else () for value in (sample.logprobs, sample.top_logprobs))
        nothing = dict(text="", token_ids=(), logprobs=logprobs, top_logprobs=top_logprobs, finish_reason="length")
        samples.append(replace(sample, **nothing))
    return replace(output, outputs=tuple(samples))


def _logprobs(output: RequestOutput, before: str, sample: CompletionOutput, texts: TokenTexts) -> dict[str, Any]:
    """Those of a sample and, where they were asked for, of the prompt, ``before`` it."""
    parts = [ScoredText(sample.text, sample.token_ids, sample.logprobs, sample.top_logprobs)]
    if output.prompt_logprobs is not None:
        prompt_logprobs = output.prompt_logprobs, output.prompt_top_logprobs
        parts.insert(0, ScoredText(before, output.prompt_token_ids, *prompt_logprobs))
    return completion_logprobs(parts, texts)


def _prompts(value: Any) -> tuple[str | Sequence[int], ...]:
    """Of the four forms that OpenAI's API takes."""
    several = isinstance(value, list) and value and isinstance(value[0], str | list)
    prompts = value if several else [value]
    of_one_kind = all(isinstance(p, str) for p in prompts) or all(is_token_ids(p) for p in prompts)
    if not of_one_kind or not all(prompts) or len(prompts) > MAX_CHOICES:
        accepted = f"text, a list of token ids, or a list of up to {MAX_CHOICES} of either, none of them empty"
        raise refused("prompt", value, accepted)
    return tuple(prompt if isinstance(prompt, str) else array("I", prompt) for prompt in prompts)
