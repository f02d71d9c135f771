"""Token ids in, token ids out: a call of generation, and shared levels that outlive it.

Shapes: n prompts, V vocabulary.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from engine.arena import Arena
from engine.attention import AttentionMethod, Auto, Keeps, get_method
from engine.attention.crossover import Crossover
from engine.calibration import Setting, find_crossover
from engine.decode_graphs import DecodeGraphs, check_capturable
from engine.decoding import Generated, full_logits
from engine.distributed import TPGroup
from engine.errors import InputError
from engine.generation import Generation, OnEnded, OnFailed, OnTokens, Options
from engine.model import Transformer
from engine.prefill import SparsePrefill, parse_prefill
from engine.prefix_tree import PrefixTree, build_from_levels, build_from_prompts, repeat, root_only, select
from engine.requests import Request, RequestMaker
from engine.rope import rope_length
from engine.sampling import SamplingParams
from engine.shared_levels import SharedLevels, even_parents
from engine.tokenizer import Tokenizer
from kernels import Backend, check_backend, check_operations_backend

SHARED_CACHE_OPS = ("wipe", "preserve", "extend")


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


def check_execution(
    group: TPGroup,
    dtype: torch.dtype,
    attention_backend: str | None,
    operations_backend: str | None,
    cuda_graphs: bool,
    prefill: str | None,
) -> tuple[Backend | None, Backend | None]:
    """The backends of these names, as an ``Engine`` takes them. Raises InputError for what cannot run there."""
    device = group.device
    parse_prefill(prefill)
    if cuda_graphs:
        check_capturable(group, attention_backend)
    try:
        attention = None if attention_backend is None else check_backend(attention_backend, device, dtype)
        operations = None if operations_backend is None else check_operations_backend(operations_backend, device, dtype)
    except ValueError as error:
        raise InputError(str(error)) from None
    return attention, operations


class Engine:
    """Generation with one loaded model. SPMD: every rank makes the same calls and gets the same results.

    The arena is sized by the work, up to the memory that is there; ``setup_caches`` sizes it ahead instead. More work
    than fits, or than ``max_batch_size`` sequences, waits for those that run to end. The tokenizer serves stop strings
    alone. With ``cuda_graphs`` decode steps are captured and replayed, with attention by Triton. ``prefill`` names how
    prompts are read, see ``engine.prefill``; without it all of attention is computed, as decode steps do in any case.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        eos_token_ids: Sequence[int] = (),
        max_batch_size: int = 1024,
        tokenizer: Tokenizer | None = None,
        attention_backend: str | None = None,
        operations_backend: str | None = None,
        cuda_graphs: bool = False,
        prefill: str | None = None,
    ):
        self._attention_backend, self._operations_backend = check_execution(
            model.group, model.embedding.weight.dtype, attention_backend, operations_backend, cuda_graphs, prefill
        )
        self.sparse_prefill = SparsePrefill.of(parse_prefill(prefill), model.name, model.config, model.group)
        if max_batch_size < 1:
            raise InputError(f"max_batch_size is {max_batch_size}; accepted: 1 sequence or more; raise it")
        self.model = model
        self.max_batch_size = max_batch_size
        self._graphs: DecodeGraphs | None = None
        if cuda_graphs:
            self._graphs = DecodeGraphs(model)
        self._maker = RequestMaker(model.config, eos_token_ids, tokenizer)
        self.arena = Arena(model)
        self._shared = SharedLevels(model, self.arena)
        self._told: set[str] = set()  # notices

    # ---- attention methods and CUDA graphs ----

    @cached_property
    def crossover(self) -> Crossover:
        """From which length on attention ``auto`` shares a node: measured here, in seconds, or before."""
        attention, dtype = self.model.layers[0].attention, self.model.embedding.weight.dtype
        group, shape = self.model.group, (attention.num_heads, attention.num_kv_heads, attention.head_dim)
        backend = self._attention_backend if self._graphs is None else Backend.TRITON
        setting = Setting.of(group.device, dtype, *shape, backend)
        return find_crossover(group, setting, dtype)

    def _begin(self, name: str) -> AttentionMethod:
        """The method of a call, which the model is to run as this engine has it: others may use the same model."""
        self.model.attention_backend, self.model.operations_backend = self._attention_backend, self._operations_backend
        self.model.sparse_prefill = self.sparse_prefill
        method = get_method(name)
        if method.moves and self.sparse_prefill is not None:
            raise InputError(f"attention {name!r} reads prompts by itself; accepted with it: prefill dense")
        if method.keeps is Keeps.NOTHING and self.sparse_prefill is not None:
            self._tell(f"attention {name} looks at no keys: a sparse prefill changes nothing")
        if method.moves and self._graphs is not None:
            raise InputError(f"attention {name!r} cannot be captured in CUDA graphs; leave one of the two out")
        if method.moves and (window := self.model.config.sliding_window) is not None:
            raise InputError(f"attention {name!r} is for models without a window; this one's is {window} tokens")
        return Auto(self.crossover) if isinstance(method, Auto) else method

    def _tell(self, notice: str) -> None:
        """Says it on rank 0, once."""
        if self.model.group.rank == 0 and notice not in self._told:
            print(f"notice: {notice}", file=sys.stderr)
        self._told.add(notice)

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
        method = self._begin(attention)
        self._shared.check(method)
        tree = self._shared.tree_of_next(prompts, parents)
        longest = max(self._maker.planned_lengths(tree, [0] * tree.num_sequences, planned_length))
        length = self._rope_length(longest)
        self._shared.check_rope_length(length, "the level")
        self.model.prepare(longest, length)
        hidden = self._shared.append(tree, prompts, parents, method, length)
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
        on_failed: OnFailed | None = None,
        repeats_differ: bool = True,
    ) -> list[list[Generated | None]]:
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
            on_failed: called once for a prompt with (its number, what is wrong) when a sample of it alone has no room,
                or its logits are not finite; None takes the sample's place in what is returned, and the others go on.
                Without it the first one raises. ``check_prompt`` tells what is wrong with a prompt beforehand.
            repeats_differ: a prompt that is given again with equal parameters draws other numbers, as a further sample
                does. Without it the two generate the same. With other parameters a prompt draws as if it were alone.

        Raises InputError for prompts or options that cannot be used.
        """
        method = self._begin(attention)
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
            requests = self._maker.requests(tree, params, forced_tokens, repeats_differ)
            lengths = self._maker.planned_lengths(tree, [p.max_tokens for p in params], planned_length)
            if below_kept:
                self._check_prompt_logprobs(params)
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
            options = Options(method, self.max_batch_size, return_logits, on_tokens, on_ended, on_failed)
            results = self._run(tree, requests, lengths, starting_logits, options)
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
            planned_length = max(self._maker.planned_lengths(tree, max_tokens))
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

    def _check_prompt_logprobs(self, params: Sequence[SamplingParams]) -> None:
        """Below kept levels: what was computed in another call has kept no log-probabilities."""
        if any(p.prompt_logprobs is not None for p in params):
            raise InputError(
                "prompt_logprobs were asked for below kept levels, whose tokens were computed before; accepted: None, "
                "or whole prompts with shared_cache_op='wipe'"
            )

    def check_prompt(self, tokens: Sequence[int], params: SamplingParams) -> None:
        """Raises InputError for a prompt that ``generate`` could serve beside no other."""
        self._maker.check_prompt(tokens, params)

    def _rope_length(self, length: int) -> int:
        return rope_length(self.model.config, length)

    def _starting_logits(self, logits: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Checked, and repeated for each prompt's samples."""
        expected = (len(counts), self.model.config.vocab_size)
        if tuple(logits.shape) != expected:
            raise InputError(f"starting_logits have shape {tuple(logits.shape)}; accepted: {expected}, (prompts, V)")
        return logits.repeat_interleave(torch.tensor(counts, device=logits.device), dim=0).to(self.model.group.device)

    def _run(
        self,
        tree: PrefixTree,
        requests: list[Request],
        lengths: list[int],
        starting_logits: torch.Tensor | None,
        options: Options,
    ) -> list[Generated | None]:
        """All sequences of the tree, those that RoPE rotates alike together: they alone can share keys. Most often
        these are all. ``requests``, ``lengths`` (the planned ones) and the results are in the caller's order."""
        alike: dict[int, list[int]] = {}
        for number, length in enumerate(lengths):
            alike.setdefault(self._rope_length(length), []).append(number)
        results: list[Generated | None] = [None] * len(requests)
        for length, members in alike.items():
            self.model.prepare(max(lengths[number] for number in members), length)
            part = tree if len(alike) == 1 else select(tree, members)
            self.arena.begin_call()
            generation = Generation(
                self.model,
                self.arena,
                part,
                self._shared.resident(part),
                [requests[number] for number in members],
                None if starting_logits is None else starting_logits[members],
                options,
                self._graphs,
            )
            for number, result in zip(members, generation.run(), strict=True):
                results[number] = result
        return results
