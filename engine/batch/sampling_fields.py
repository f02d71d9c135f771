"""The fields of a request that say how tokens are chosen, the same for both endpoints: OpenAI's, and those that vLLM
adds.
"""

import hashlib

from engine.batch.fields import Fields
from engine.batch.refusal import RefusedError
from engine.errors import InputError
from engine.sampling import SamplingParams

# Samples of a request at most, those of all its prompts together.
MAX_CHOICES = 2048
_MAX_STOPS = 64

# Names for the provider's bookkeeping, which change no token. Whatever they hold is accepted.
_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")

# Options of both endpoints that are not supported, and the values with which they ask for nothing.
NEUTRAL = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "stream": (False,),
    "stream_options": (),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "bad_words": ([],),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
}


def derived_seed(seed: int, part: str | int) -> int:
    """A seed of its own for each ``part`` of what runs under ``seed``, the same on every machine."""
    digest = hashlib.blake2b(f"{seed} {part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def take_params(fields: Fields, *, seed: int, max_tokens: int, logprobs: int | None) -> SamplingParams:
    """The rest of ``fields`` that belongs in SamplingParams. ``seed`` is that of a request which names none.

    Raises RefusedError for a value that is not accepted.
    """
    for name in _LABELS:
        fields.take(name)
    options = dict(
        n=fields.integer("n", 1, least=1, most=MAX_CHOICES),
        temperature=fields.number("temperature", 1.0),
        top_p=fields.number("top_p", 1.0),
        top_k=fields.integer("top_k", 0, least=-1),
        min_p=fields.number("min_p", 0.0),
        stop=fields.texts("stop", _MAX_STOPS),
        stop_token_ids=tuple(fields.token_ids("stop_token_ids")),
        include_stop_str_in_output=fields.boolean("include_stop_str_in_output", False),
        ignore_eos=fields.boolean("ignore_eos", False),
        seed=fields.integer("seed", seed),
    )
    try:
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **options)
    except InputError as error:  # "name: got ..."
        raise RefusedError(str(error), str(error).partition(":")[0]) from None
