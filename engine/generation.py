"""Generation for all sequences of a tree: as many at a time as memory and batch size allow, the others in their turn.

A sequence that ends makes room for one that waits. Letting some in takes a prefill, so they gather until it pays.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.arena import Arena, NoRoomError
from engine.attention import AttentionMethod, Keeps
from engine.decode_graphs import DecodeGraphs
from engine.decoding import Decoder, DecodingError, Generated
from engine.errors import InputError
from engine.executor import Executor
from engine.finiteness import first_not_finite
from engine.model import Transformer
from engine.prefix_tree import PrefixTree
from engine.prompt_logprobs import PromptLogprobs
from engine.requests import Request
from engine.tree_room import ResidentNode, TreeRoom

# Called after every step with (new tokens, sequences that ended).
OnTokens = Callable[[int, int], None]
# Called for every sequence as soon as it ends; the request holds its prompt's number and its own among the samples.
OnEnded = Callable[[Request, Generated], None]
# Called with a prompt's number, in the caller's order, and why it cannot be served.
OnFailed = Callable[[int, str], None]


@dataclass(frozen=True)
class Options:
    """What all sequences of a call have in common."""

    method: AttentionMethod
    max_batch_size: int
    return_logits: bool = False
    on_tokens: OnTokens | None = None
    on_ended: OnEnded | None = None
    on_failed: OnFailed | None = None  # without it the first failure ends the call


class Gathering:
    """Tells when rows that ended sequences left are to be given to waiting ones.

    Letting some in takes a prefill, whose fixed cost (the weights are read, the kernels launched) is at most that of a
    decode step; a row that stands empty wastes its part of that cost in each step. So they gather until empty rows have
    cost as much as the prefill will, taken as half a step of all rows. Like renting skis until that came to their
    price, it is never much worse than knowing beforehand how long sequences run.
    """

    def __init__(self) -> None:
        self._num_rows = self._num_idle_steps = 0

    def is_over(self, num_running: int) -> bool:
        """To be asked once before every step."""
        self._num_idle_steps += self._num_rows - num_running
        return num_running == 0 or 2 * self._num_idle_steps >= self._num_rows > num_running

    def begin(self, num_running: int) -> None:
        """As many run as there is room for."""
        self._num_rows, self._num_idle_steps = num_running, 0


class _ScoringError(RuntimeError):
    """The logits from which a token of a sequence's prompt follows are not finite."""

    def __init__(self, sequence: int, token: int):
        super().__init__(f"the log-probability of token {token} of sequence {sequence} is not defined")
        self.sequence, self.token = sequence, token


class Generation:
    """One tree, whose sequences RoPE rotates alike. ``run`` it once. Every rank makes the same calls.

    ``requests`` (n), ``starting_logits`` (n, V) and what ``run`` returns are in the caller's order; ``kept`` are the
    nodes that are in the arena already.
    """

    def __init__(
        self,
        model: Transformer,
        arena: Arena,
        tree: PrefixTree,
        kept: Mapping[int, ResidentNode],
        requests: Sequence[Request],
        starting_logits: torch.Tensor | None,
        options: Options,
        graphs: DecodeGraphs | None = None,
    ):
        self._model, self._arena, self._tree, self._options = model, arena, tree, options
        order = np.array(tree.order)
        self._requests = [requests[i] for i in order]
        self._failed_prompts: set[int] = set()
        max_tokens = np.array([request.params.max_tokens for request in self._requests], dtype=np.int64)
        rooms = tree.table.suffix_length + max_tokens - 1  # the last token is never read
        asked = any(request.params.prompt_logprobs is not None for request in requests)
        self._prompt_logprobs = PromptLogprobs(model, tree, self._requests) if asked else None
        scoring_bytes = self._prompt_logprobs.activation_bytes if self._prompt_logprobs else 0
        self._room = TreeRoom(arena, model, tree, options.method, rooms, kept, scoring_bytes)
        room = self._room
        self._executor = Executor(model, options.method, tree, room.placement, room.node_hidden, None, graphs)
        self._decoder = Decoder(
            self._executor,
            self._requests,
            starting_logits=None if starting_logits is None else starting_logits[torch.from_numpy(order)],
            return_logits=options.return_logits,
            on_tokens=options.on_tokens,
            on_ended=options.on_ended,
        )

    def run(self) -> list[Generated | None]:
        """What each sequence generated; None for those that failed.

        Raises NoRoomError for a sequence that alone has no room, and InputError for one whose logits are not finite,
        unless failures are told to ``on_failed``.
        """
        room, decoder, gathering = self._room, self._decoder, Gathering()
        try:
            while room.num_waiting or len(decoder.active):
                if room.num_waiting and gathering.is_over(len(decoder.active)):
                    self._admit()
                    gathering.begin(len(decoder.active))
                if len(decoder.active):
                    room.release(self._choose())
                    decoder.advance()
        except BaseException:
            room.expect_nan()
            raise
        finally:
            room.close()
        return [decoder.results[i] for i in np.argsort(self._tree.order).tolist()]

    def _admit(self) -> None:
        room = self._room
        if not len(room.running):
            self._executor.cache = None  # or the arena could not give it back before it takes another
        next_request = self._requests[room.num_admitted]
        try:
            limit = self._options.max_batch_size - len(room.running)
            sequences = room.admit(limit, self._name(next_request))
        except NoRoomError as error:
            self._fail(next_request, error)
            room.skip()
            return
        if self._options.method.keeps is not Keeps.NOTHING:
            self._executor.cache = self._arena.cache
        if len(sequences):
            self._decoder.add(sequences, self._executor.prefill(sequences, self._prompt_logprobs))
            if self._prompt_logprobs is not None:
                self._take_prompt_logprobs(sequences)

    def _take_prompt_logprobs(self, sequences: np.ndarray) -> None:
        for i, found in self._prompt_logprobs.take(sequences).items():
            if (token := found.first_undefined()) is None:
                self._decoder.results[i].prompt_logprobs = found
            else:
                self._drop(i, _ScoringError(i, token))

    def _choose(self) -> np.ndarray:
        """The sequences that ended."""
        while len(self._decoder.active):
            try:
                return self._decoder.choose()
            except DecodingError as error:
                self._drop(error.sequence, error)
        return np.empty(0, dtype=np.int64)

    def _drop(self, sequence: int, error: DecodingError | _ScoringError) -> None:
        """A sequence that runs, and whose numbers are not finite, does not go on."""
        self._room.expect_nan()
        self._fail(self._requests[sequence], error)
        self._decoder.drop(sequence)
        self._room.release(np.array([sequence]))

    def _fail(self, request: Request, error: NoRoomError | DecodingError | _ScoringError) -> None:
        """Of several samples of a prompt the first that fails is explained, which may take a prefill."""
        if self._options.on_failed is None or request.prompt not in self._failed_prompts:
            explained = error if isinstance(error, NoRoomError) else self._not_finite(error)
            if self._options.on_failed is None:
                raise explained
            self._failed_prompts.add(request.prompt)
            self._options.on_failed(request.prompt, str(explained))
        if self._options.on_tokens is not None:
            self._options.on_tokens(0, 1)

    def _name(self, request: Request) -> str:
        return f"prompt {request.prompt}" if self._options.on_failed is None else "the prompt"

    def _not_finite(self, error: DecodingError | _ScoringError) -> InputError:
        """What to raise when a sequence's logits are not finite."""
        name, tokens = self._name(self._requests[error.sequence]), self._tree.sequence_tokens(error.sequence).tolist()
        if isinstance(error, _ScoringError):
            tokens = tokens[: error.token]
            what = f"{name}, after {error.token} of its tokens: the next one's log-probability is not defined"
        else:
            tokens += error.token_ids
            what = f"{name}, after {len(error.token_ids)} new tokens: no token can be chosen from its logits"
        part = first_not_finite(self._model, self._options.method, tokens)
        dtype = str(self._model.embedding.weight.dtype).removeprefix("torch.")
        where = f"{part} is the first to give NaN or infinity" if part else "run alone it has neither NaN nor infinity"
        return InputError(
            f"{what}; {where} in {dtype}; use a --dtype of wider range (bfloat16 or float32), or other weights"
        )
