"""What each sequence is to generate, made from prompts and parameters that were checked against the model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from engine.config import ModelConfig
from engine.errors import InputError
from engine.prefix_tree import PrefixTree, build_from_prompts
from engine.sampling import SamplingParams, prompt_hash, row_key
from engine.stopping import StopChecker
from engine.tokenizer import Tokenizer

_TOLD = ("logprobs", "prompt_logprobs", "include_stop_str_in_output")


@dataclass(frozen=True)
class Request:
    """What one sequence is to generate."""

    prompt: int  # the caller's number of it
    params: SamplingParams
    stop_ids: frozenset[int]  # a token that ends the sequence
    draw_key: int  # 64 bits, signed; the random numbers of the sequence depend on nothing else
    forced: tuple[int, ...] = ()  # tokens that are taken instead of chosen ones, from the first on
    sample: int = 0  # which of the prompt's samples
    stop_text: StopChecker | None = None  # told every token; what finds ``params.stop``


class RequestMaker:
    """Checks what a model is asked for, and makes requests of it. The tokenizer serves stop strings alone."""

    def __init__(self, config: ModelConfig, eos_token_ids: Sequence[int], tokenizer: Tokenizer | None):
        self._config, self._eos_token_ids, self._tokenizer = config, frozenset(eos_token_ids), tokenizer

    def requests(
        self,
        tree: PrefixTree,
        params: Sequence[SamplingParams],
        forced_tokens: Sequence[Sequence[int]] | None,
        repeats_differ: bool,
    ) -> list[Request]:
        """One request for each sample, in the caller's order. ``repeats_differ`` is that of ``Engine.generate``."""
        if forced_tokens is None:
            forced_tokens = [()] * len(params)
        elif len(forced_tokens) != len(params):
            raise InputError(
                f"forced_tokens for {len(forced_tokens)} of {len(params)} prompts; accepted: a list for each"
            )
        # A prompt that is there again with the same parameters draws other numbers; one with others is on its own, or
        # its draws would depend on who else is there.
        occurrences: Counter[tuple] = Counter()
        requests = []
        for number, i in enumerate(np.argsort(tree.order).tolist()):
            p, forced = params[number], self._forced(number, forced_tokens[number], params[number].max_tokens)
            digest = prompt_hash(tree.sequence_tokens(i))
            self._check_stops(p)
            stop_ids = frozenset(p.stop_token_ids) | (frozenset() if p.ignore_eos else self._eos_token_ids)
            asked = (digest, *_what_is_generated(p))
            keys = [row_key(p.seed, digest, occurrences[asked], sample) for sample in range(p.n)]
            for sample, key in enumerate(keys):
                stop_text = StopChecker(self._tokenizer, p.stop) if p.stop else None
                requests.append(Request(number, p, stop_ids, key, forced, sample, stop_text))
            if repeats_differ:
                occurrences[asked] += 1
        return requests

    def planned_lengths(
        self, tree: PrefixTree, max_tokens: Sequence[int], planned_length: int | None = None
    ) -> list[int]:
        """Each sequence's planned length. Token ids are checked to be inside the vocabulary, sequences inside the
        model's positions. All in the caller's order."""
        for tokens in (*(node.tokens for node in tree.nodes), *tree.suffixes):
            self.check_ids(tokens, "the prompt")
        limit = self._config.max_positions
        if planned_length is not None and planned_length > limit:
            raise InputError(f"planned_length is {planned_length}; accepted: up to {limit}, the model's positions")
        lengths = []
        for caller, i in enumerate(np.argsort(tree.order).tolist()):
            length = tree.sequence_length(i)
            self._check_length(f"prompt {caller}", length, max_tokens[caller])
            lengths.append(length + max_tokens[caller])
        if planned_length is None:
            return lengths
        if max(lengths) > planned_length:
            raise InputError(
                f"planned_length is {planned_length}, but a prompt and its new tokens make {max(lengths)}; accepted: "
                "at least as many; raise it"
            )
        return [planned_length] * len(lengths)

    def check_prompt(self, tokens: Sequence[int], params: SamplingParams) -> None:
        """Raises InputError for a prompt that ``Engine.generate`` could serve beside no other."""
        build_from_prompts([tokens])  # which refuses what are no token ids
        self.check_ids(np.asarray(tokens), "the prompt")
        self._check_length("the prompt", len(tokens), params.max_tokens)
        self._check_stops(params)

    def check_ids(self, tokens: np.ndarray, what: str) -> None:
        """Raises InputError for a token id outside the vocabulary."""
        vocab_size = self._config.vocab_size
        if len(tokens) and not (0 <= tokens.min() and tokens.max() < vocab_size):
            wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
            raise InputError(
                f"{what} holds token id {wrong}; accepted: 0 to {vocab_size - 1}, the model's vocabulary; use the "
                "tokenizer that belongs to the model"
            )

    def _check_length(self, what: str, length: int, max_tokens: int) -> None:
        limit = self._config.max_positions
        if length + max_tokens > limit:
            raise InputError(
                f"{what} has {length} tokens and is to get {max_tokens} more; accepted: at most {limit} together, the "
                "model's positions; shorten the prompt or lower max_tokens"
            )

    def _check_stops(self, params: SamplingParams) -> None:
        if params.stop and self._tokenizer is None:
            raise InputError(
                f"stop: got {params.stop!r}, but there is no tokenizer to tell the text; accepted: () without one; use "
                "stop_token_ids, or add the model's tokenizer.json"
            )
        self.check_ids(np.array(params.stop_token_ids, dtype=np.int64), "stop_token_ids")

    def _forced(self, number: int, tokens: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """Checked forced tokens of prompt ``number``."""
        ids = np.asarray(tokens)
        if len(ids) and ids.dtype.kind not in "iu":
            raise InputError(f"forced_tokens of prompt {number}: got {ids.dtype} values; accepted: token ids, integers")
        if len(ids) > max_tokens:
            raise InputError(
                f"forced_tokens of prompt {number}: got {len(ids)} for {max_tokens} new tokens; accepted: as many or "
                "fewer; raise max_tokens or leave some out"
            )
        self.check_ids(ids, f"forced_tokens of prompt {number}")
        return tuple(ids.tolist())


def _what_is_generated(params: SamplingParams) -> tuple:
    """All that decides about tokens, and not what is told of them: asking for more does not change them."""
    return tuple(getattr(params, field.name) for field in fields(params) if field.name not in _TOLD)
