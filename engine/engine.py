"""Token ids in, token ids out: a call of generation, in as many waves as needed, with shared levels that outlive it.

Shapes: n prompts, B sequences of a wave, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch

from engine.activations import tree_activation_bytes
from engine.arena import Arena
from engine.attention import AttentionMethod, get_method
from engine.decoding import DecodingError, Generated, Request, decode, full_logits
from engine.errors import InputError
from engine.executor import Executor, ResidentNode
from engine.finiteness import first_not_finite
from engine.model import Transformer
from engine.prefix_tree import PrefixTree, build_from_levels, build_from_prompts, repeat, root_only, select
from engine.rope import rope_length
from engine.sampling import SamplingParams, prompt_hash, row_key
from engine.shared_levels import SharedLevels, even_parents
from engine.stopping import StopChecker
from engine.tokenizer import Tokenizer
from engine.waves import restrict, waves

SHARED_CACHE_OPS = ("wipe", "preserve", "extend")

# Called after every step with (new tokens, sequences that ended).
OnTokens = Callable[[int, int], None]
# Called for every sequence as soon as it ends; the request holds its prompt's number and its own among the samples.
OnEnded = Callable[[Request, Generated], None]


@dataclass(frozen=True)
class Levels:
    """Prompts laid out by hand: ``levels[0]`` are the roots, the last level's entries are the sequences.

    ``parents[l - 1][j]`` is the entry of level ``l - 1`` that entry ``j`` of level ``l`` continues; without ``parents``
    each level divides evenly into consecutive blocks.
    """

    levels: Sequence[Sequence[Sequence[int]]]
    parents: Sequence[Sequence[int]] | None = None

    def __post_init__(self):
        if not self.levels:
            raise InputError("Levels: got no level; accepted: one or more, the last one holding the sequences; add one")
        for number, level in enumerate(self.levels):
            if len(level) == 0:
                raise InputError(f"level {number}: got no prompts; accepted: one or more; remove the level or fill it")
        if self.parents is not None and len(self.parents) != len(self.levels) - 1:
            raise InputError(
                f"Levels: got parents for {len(self.parents)} levels; accepted: for {len(self.levels) - 1}, each level "
                "but the first; match them"
            )

    def all_parents(self) -> list[list[int]]:
        """``parents``, spelled out."""
        if self.parents is not None:
            return [list(p) for p in self.parents]
        return [even_parents(len(above), len(below)) for above, below in zip(self.levels, self.levels[1:])]


@dataclass(frozen=True)
class _Wave:
    """A stretch of a tree's sequences, and the room that it asks for."""

    tree: PrefixTree
    whole_index: list[int]  # each node's index in the whole tree
    rooms: np.ndarray  # (B,) int64, for each sequence's suffix and new tokens
    resident: dict[int, ResidentNode]
    uniform: bool  # whether rooms may be padded to equal ones
    ranges: list[int]
    activation_bytes: int  # the most that its forward passes take

    @classmethod
    def of(
        cls,
        tree: PrefixTree,
        stretch: tuple[int, int],
        rooms: np.ndarray,
        in_arena: Mapping[int, ResidentNode],
        method: AttentionMethod,
        model: Transformer,
        uniform: bool,
    ) -> "_Wave":
        part, whole_index = restrict(tree, *stretch)
        resident = {i: in_arena[whole] for i, whole in enumerate(whole_index) if whole in in_arena}
        rooms = rooms[slice(*stretch)]
        ranges = method.ranges(part, rooms, _slots(resident), uniform=uniform)
        needed = tree_activation_bytes(model, part, resident)
        return cls(part, whole_index, rooms, resident, uniform, ranges, needed)


class Engine:
    """Generation with one loaded model. SPMD: every rank makes the same calls and gets the same results.

    The arena is sized by the work, up to the memory that is there; ``setup_caches`` sizes it ahead instead. More work
    than fits, or than ``max_batch_size`` sequences, runs in waves. The tokenizer serves stop strings alone.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        eos_token_ids: Sequence[int] = (),
        max_batch_size: int = 1024,
        tokenizer: Tokenizer | None = None,
    ):
        if max_batch_size < 1:
            raise InputError(f"max_batch_size is {max_batch_size}; accepted: 1 sequence or more; raise it")
        self.model = model
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_batch_size = max_batch_size
        self.tokenizer = tokenizer
        self.arena = Arena(model)
        self._shared = SharedLevels(model, self.arena)

    # ---- caches and kept levels ----

    def setup_caches(self, num_tokens: int) -> None:
        """Takes a KV cache for ``num_tokens`` tokens ahead, which then keeps its size. Kept levels are dropped."""
        self.empty_shared()
        self.arena.set_up(num_tokens)

    def release_caches(self) -> None:
        """Gives the KV cache back; from now on it is sized by the work. Kept levels are dropped."""
        self.empty_shared()
        self.arena.release()

    @property
    def num_shared_levels(self) -> int:
        return len(self._shared.levels)

    def append_shared(
        self,
        prompts: Sequence[Sequence[int]],
        parents: Sequence[int] | None = None,
        *,
        attention: str = "hydragen",
        planned_length: int | None = None,
    ) -> torch.Tensor:
        """Computes one more level below the kept ones, and keeps it.

        Entry ``j`` continues entry ``parents[j]`` of the last level, or the level divides evenly into blocks. An entry
        that none continues stays, but can no longer be generated below. Where RoPE goes by a sequence's length
        (dynamic, longrope), ``planned_length`` is what the sequences below will have; without it, what they have so
        far. Returns the logits after each entry's last token, ``(n, V)`` float32.
        """
        method = get_method(attention)
        self._shared.check(method)
        tree = self._shared.tree_of_next(prompts, parents)
        longest = max(self._check(tree, [0] * tree.num_sequences, planned_length))
        rope_length = self._rope_length(longest)
        self._shared.check_rope_length(rope_length, "the level")
        self.model.prepare(longest, rope_length)
        hidden = self._shared.append(tree, prompts, parents, method, rope_length)
        return full_logits(self.model.logits(hidden), self.model.config.vocab_size, self.model.group)

    def truncate_shared(self, num_levels: int) -> None:
        """Keeps the first ``num_levels`` levels and drops the others."""
        self._shared.truncate(num_levels)

    def empty_shared(self) -> None:
        """Drops all kept levels."""
        self._shared.truncate(0)

    # ---- generation ----

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Levels,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        attention: str = "hydragen",
        shared_cache_op: str = "wipe",
        parents: Sequence[int] | None = None,
        disable_hierarchy: bool = False,
        min_shared: int | None = None,
        starting_logits: torch.Tensor | None = None,
        forced_tokens: Sequence[Sequence[int]] | None = None,
        return_logits: bool = False,
        planned_length: int | None = None,
        on_tokens: OnTokens | None = None,
        on_ended: OnEnded | None = None,
    ) -> list[list[Generated]]:
        """For each prompt, in the caller's order, its ``params.n`` samples.

        Args:
            prompts: token ids, whose shared prefixes are found by themselves; or ``Levels``, laid out by hand.
            params: for all prompts, or one for each.
            attention: the method, by name.
            shared_cache_op: ``wipe`` drops the kept levels first; ``preserve`` continues them and leaves them as they
                were; ``extend`` continues them and keeps the prompts as further levels. Below kept levels, prompts
                share what those hold and nothing else.
            parents: for each prompt (of ``Levels`` each of the first level) below kept levels, the entry of the last
                one that it continues, not necessarily all of them; without it they divide evenly into blocks.
            disable_hierarchy: share the roots only.
            min_shared: a shared stretch of fewer tokens is not shared; for flat prompts, 1 if not given.
            starting_logits: (n, V); the first new token is chosen from these.
            forced_tokens: for each prompt, tokens to take instead of chosen ones, from the first on.
            return_logits: keep the logits that every token was chosen from.
            planned_length: where RoPE goes by a sequence's length (dynamic, longrope), the length to take instead of
                each prompt's with its ``max_tokens``. A sequence is rotated by it from its first token to its last.
            on_tokens: called after every step with (new tokens, sequences that ended).
            on_ended: called for every sequence as soon as it ends with (its request, what it generated).

        Raises InputError for prompts or options that cannot be used, and for a prompt that alone has no room.
        """
        method = get_method(attention)
        if shared_cache_op not in SHARED_CACHE_OPS:
            accepted = ", ".join(SHARED_CACHE_OPS)
            raise InputError(f"shared_cache_op {shared_cache_op!r} is not known; accepted: {accepted}")
        if shared_cache_op != "wipe":
            self._shared.check(method)
        if shared_cache_op == "extend" and min_shared is not None:  # before anything is computed
            raise InputError(f"min_shared {min_shared} was given, but levels are shared as laid out; leave it out")
        num_kept = self.num_shared_levels
        try:
            if shared_cache_op == "extend":
                self._extend(prompts, parents, params, attention, planned_length)
                prompts, parents = [()] * len(self._shared.levels[-1]), None
            below_kept = shared_cache_op != "wipe" and self.num_shared_levels > 0
            tree = self._tree(prompts, parents, min_shared, below_kept)
            params = self._params(params, tree.num_sequences)
            counts = [p.n for p in params]
            requests = self._requests(tree, params, forced_tokens)
            lengths = self._check(tree, [p.max_tokens for p in params], planned_length)
            if below_kept:
                for number, length in enumerate(lengths):
                    self._shared.check_rope_length(self._rope_length(length), f"prompt {number}")
            if starting_logits is not None:
                starting_logits = self._starting_logits(starting_logits, counts)
            tree = repeat(tree, counts)
            if disable_hierarchy:
                tree = root_only(tree)
            if shared_cache_op == "wipe":
                self.empty_shared()  # now that nothing is wrong with the call
            lengths = [length for length, count in zip(lengths, counts, strict=True) for _ in range(count)]
            results = self._run_alike(
                tree, requests, lengths, method, starting_logits, return_logits, on_tokens, on_ended
            )
        except BaseException:
            self.truncate_shared(min(num_kept, self.num_shared_levels))  # a call that fails extends nothing
            raise
        ends = np.cumsum(counts)
        return [results[end - count : end] for end, count in zip(ends, counts, strict=True)]

    def _extend(
        self,
        prompts: Sequence[Sequence[int]] | Levels,
        parents: Sequence[int] | None,
        params: SamplingParams | Sequence[SamplingParams],
        attention: str,
        planned_length: int | None,
    ) -> None:
        laid_out = prompts if isinstance(prompts, Levels) else Levels([prompts])
        if planned_length is None:
            tree = self._tree(prompts, parents, None, self.num_shared_levels > 0)
            max_tokens = [p.max_tokens for p in self._params(params, tree.num_sequences)]
            planned_length = max(self._check(tree, max_tokens))
        all_parents = [parents, *laid_out.all_parents()]
        for level, owners in zip(laid_out.levels, all_parents, strict=True):
            self.append_shared(level, owners, attention=attention, planned_length=planned_length)

    def _tree(
        self,
        prompts: Sequence[Sequence[int]] | Levels,
        parents: Sequence[int] | None,
        min_shared: int | None,
        below_kept: bool,
    ) -> PrefixTree:
        by_hand = isinstance(prompts, Levels)
        if min_shared is not None and (by_hand or below_kept):
            raise InputError(
                f"min_shared {min_shared} was given, but levels are shared as they are laid out; leave it out"
            )
        if parents is not None and not below_kept:
            raise InputError("parents were given, but there are no kept levels to continue; leave them out")
        if not by_hand and not below_kept:
            return build_from_prompts(prompts, min_shared=1 if min_shared is None else min_shared)
        laid_out = prompts if by_hand else Levels([prompts])
        if not below_kept:
            return build_from_levels(laid_out.levels, parents=laid_out.parents)
        above, all_parents = self._shared.above(len(laid_out.levels[0]), parents)
        return build_from_levels([*above, *laid_out.levels], parents=[*all_parents, *laid_out.all_parents()])

    def _params(self, params: SamplingParams | Sequence[SamplingParams], num_prompts: int) -> list[SamplingParams]:
        if isinstance(params, SamplingParams):
            return [params] * num_prompts
        if len(params) != num_prompts:
            raise InputError(f"{len(params)} SamplingParams for {num_prompts} prompts; accepted: one, or one for each")
        return list(params)

    def _requests(
        self, tree: PrefixTree, params: list[SamplingParams], forced_tokens: Sequence[Sequence[int]] | None
    ) -> list[Request]:
        """One request for each sample, in the caller's order."""
        if forced_tokens is None:
            forced_tokens = [()] * len(params)
        elif len(forced_tokens) != len(params):
            raise InputError(
                f"forced_tokens for {len(forced_tokens)} of {len(params)} prompts; accepted: a list for each"
            )
        occurrences: Counter[bytes] = Counter()
        requests = []
        for number, i in enumerate(np.argsort(tree.order).tolist()):
            p, forced = params[number], self._forced(number, forced_tokens[number], params[number].max_tokens)
            digest = prompt_hash(tree.sequence_tokens(i))
            self._check_ids(np.array(p.stop_token_ids, dtype=np.int64), "stop_token_ids")
            stop_ids = frozenset(p.stop_token_ids) | (frozenset() if p.ignore_eos else self.eos_token_ids)
            keys = [row_key(p.seed, digest, occurrences[digest], sample) for sample in range(p.n)]
            for sample, key in enumerate(keys):
                stop_text = StopChecker(self.tokenizer, p.stop) if p.stop and self.tokenizer is not None else None
                requests.append(Request(number, p, stop_ids, key, forced, sample, stop_text))
            occurrences[digest] += 1
        return requests

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
        self._check_ids(ids, f"forced_tokens of prompt {number}")
        return tuple(ids.tolist())

    def _check(self, tree: PrefixTree, max_tokens: Sequence[int], planned_length: int | None = None) -> list[int]:
        """Token ids inside the vocabulary, sequences inside the model's positions; each sequence's planned length.

        All in the caller's order.
        """
        for tokens in (*(node.tokens for node in tree.nodes), *tree.suffixes):
            self._check_ids(tokens, "the prompt")
        limit = self.model.config.max_positions
        if planned_length is not None and planned_length > limit:
            raise InputError(f"planned_length is {planned_length}; accepted: up to {limit}, the model's positions")
        lengths = []
        for caller, i in enumerate(np.argsort(tree.order).tolist()):
            length = tree.sequence_length(i)
            if length + max_tokens[caller] > limit:
                raise InputError(
                    f"prompt {caller} has {length} tokens and is to get {max_tokens[caller]} more; accepted: at most "
                    f"{limit} together, the model's positions; shorten the prompt or lower max_tokens"
                )
            lengths.append(length + max_tokens[caller])
        if planned_length is None:
            return lengths
        if max(lengths) > planned_length:
            raise InputError(
                f"planned_length is {planned_length}, but a prompt and its new tokens make {max(lengths)}; accepted: "
                "at least as many; raise it"
            )
        return [planned_length] * len(lengths)

    def _rope_length(self, length: int) -> int:
        return rope_length(self.model.config, length)

    def _check_ids(self, tokens: np.ndarray, what: str) -> None:
        vocab_size = self.model.config.vocab_size
        if len(tokens) and not (0 <= tokens.min() and tokens.max() < vocab_size):
            wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
            raise InputError(
                f"{what} holds token id {wrong}; accepted: 0 to {vocab_size - 1}, the model's vocabulary; use the "
                "tokenizer that belongs to the model"
            )

    def _starting_logits(self, logits: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Checked, and repeated for each prompt's samples."""
        expected = (len(counts), self.model.config.vocab_size)
        if tuple(logits.shape) != expected:
            raise InputError(f"starting_logits have shape {tuple(logits.shape)}; accepted: {expected}, (prompts, V)")
        return logits.repeat_interleave(torch.tensor(counts, device=logits.device), dim=0).to(self.model.group.device)

    # ---- waves ----

    def _run_alike(
        self,
        tree: PrefixTree,
        requests: list[Request],
        lengths: list[int],
        method: AttentionMethod,
        starting_logits: torch.Tensor | None,
        return_logits: bool,
        on_tokens: OnTokens | None,
        on_ended: OnEnded | None,
    ) -> list[Generated]:
        """All sequences of the tree, those that RoPE rotates alike together: they alone can share keys. Most often
        these are all. ``requests``, ``lengths`` (the planned ones) and the results are in the caller's order."""
        alike: dict[int, list[int]] = {}
        for number, length in enumerate(lengths):
            alike.setdefault(self._rope_length(length), []).append(number)
        results: list[Generated | None] = [None] * len(requests)
        for length, members in alike.items():
            self.model.prepare(max(lengths[number] for number in members), length)
            generated = self._run(
                tree if len(alike) == 1 else select(tree, members),
                [requests[number] for number in members],
                method,
                None if starting_logits is None else starting_logits[members],
                return_logits,
                on_tokens,
                on_ended,
            )
            for number, result in zip(members, generated, strict=True):
                results[number] = result
        return results

    def _run(
        self,
        tree: PrefixTree,
        requests: list[Request],
        method: AttentionMethod,
        starting_logits: torch.Tensor | None,
        return_logits: bool,
        on_tokens: OnTokens | None,
        on_ended: OnEnded | None,
    ) -> list[Generated]:
        """All sequences of the tree, wave by wave. ``requests`` and the results are in the caller's order."""
        self.arena.begin_call()
        order = np.array(tree.order)
        max_tokens = np.array([request.params.max_tokens for request in requests], dtype=np.int64)[order]
        rooms = np.array([len(s) for s in tree.suffixes], dtype=np.int64) + max_tokens - 1  # the last one is never read
        kept = self._shared.resident(tree)
        passed_on: dict[int, ResidentNode] = {}  # nodes of the wave before that the next one reads too
        results: list[Generated | None] = [None] * len(requests)

        def part(first: int, last: int) -> _Wave:
            at = tree, (first, last), rooms, kept | passed_on, method, self.model
            wave = _Wave.of(*at, uniform=True)
            return wave if wave_fits(wave) else _Wave.of(*at, uniform=False)

        def wave_fits(wave: _Wave) -> bool:
            return self.arena.fits(wave.ranges, wave.activation_bytes)

        try:
            fits = lambda first, last: wave_fits(part(first, last))  # noqa: E731
            for first, last in waves(tree.num_sequences, self.max_batch_size, fits):
                wave, callers = part(first, last), order[first:last]
                # Only a wave of one sequence can lack the room: a longer one is as long as fits.
                what = f"prompt {requests[callers[0]].prompt}"
                starts = self.arena.allocate(wave.ranges, what, wave.activation_bytes)
                reread = set(tree.leaf_path(last)) if last < tree.num_sequences else set()
                new_nodes: dict[int, ResidentNode] = {}
                try:
                    executor = self._place(wave, method, starts)
                    hidden = executor.prefill()
                    logits = self._first_logits(hidden, starting_logits, callers)
                    generated = decode(
                        executor,
                        logits,
                        [requests[c] for c in callers],
                        return_logits=return_logits,
                        on_tokens=on_tokens,
                        on_ended=on_ended,
                    )
                    if method.own_node_ranges:
                        new_nodes = executor.new_nodes()
                    del executor  # it holds the arena's tensors, which the next wave may replace with larger ones
                except DecodingError as error:
                    self.arena.clear(wave.ranges, starts)
                    request = requests[callers[error.sequence]]
                    prompt = wave.tree.sequence_tokens(error.sequence).tolist()
                    raise self._not_finite(method, request, prompt, error) from error
                except BaseException:
                    self.arena.clear(wave.ranges, starts)
                    raise
                finally:
                    staying = {wave.whole_index[i]: n for i, n in new_nodes.items() if wave.whole_index[i] in reread}
                    self.arena.free_all(wave.ranges, starts, but={node.slot for node in staying.values()})
                self._drop(passed_on, passed_on.keys() - reread)
                passed_on |= staying
                if last < tree.num_sequences and not fits(last, last + 1):
                    # Where they lie they leave no range that is long enough; the empty arena may have one.
                    self._drop(passed_on, set(passed_on))
                for caller, result in zip(callers, generated, strict=True):
                    results[caller] = result
        finally:
            self._drop(passed_on, set(passed_on))
        return results

    def _not_finite(
        self, method: AttentionMethod, request: Request, prompt: list[int], error: DecodingError
    ) -> InputError:
        """What to raise when a sequence's logits are not finite."""
        part = first_not_finite(self.model, method, [*prompt, *error.token_ids])
        dtype = str(self.model.embedding.weight.dtype).removeprefix("torch.")
        where = f"{part} is the first to give NaN or infinity" if part else "run alone it has neither NaN nor infinity"
        return InputError(
            f"prompt {request.prompt}, after {len(error.token_ids)} new tokens: no token can be chosen from its "
            f"logits; {where} in {dtype}; use a --dtype of wider range (bfloat16 or float32), or other weights"
        )

    def _place(self, wave: _Wave, method: AttentionMethod, starts: list[int]) -> Executor:
        placement = method.place(wave.tree, wave.rooms, _slots(wave.resident), starts, uniform=wave.uniform)
        cache = self.arena.cache if method.uses_cache else None
        return Executor(self.model, cache, method, wave.tree, placement, wave.resident)

    def _first_logits(
        self, hidden: torch.Tensor, starting_logits: torch.Tensor | None, callers: np.ndarray
    ) -> torch.Tensor:
        """``(B, V)``: this rank's part of the logits that the first new tokens are chosen from."""
        if starting_logits is None:
            return self.model.logits(hidden)
        head = self.model.head
        rows = starting_logits[torch.from_numpy(callers).to(starting_logits.device)].float()
        mine = rows[:, head.first : head.first + head.num_real]
        return torch.nn.functional.pad(mine, (0, head.weight.shape[0] - head.num_real), value=float("-inf"))

    def _drop(self, nodes: dict[int, ResidentNode], indices: Set[int]) -> None:
        for index in indices:
            node = nodes.pop(index)
            self.arena.free(node.slot, node.length)


def _slots(resident: Mapping[int, ResidentNode]) -> dict[int, int]:
    return {index: node.slot for index, node in resident.items()}
