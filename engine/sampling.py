"""Choosing the next token from logits that are split over the vocabulary.

A draw is one uniform number per row, keyed by what the row *is* (seed, prompt, occurrence, sample, step) and put
through the inverse of the row's cumulative distribution. So a token depends on neither the batch around it, its order,
the rank, nor the number of ranks. Every rank returns the same tokens.

Shapes: B rows, V the rank's part of the vocabulary, W ranks, N blocks of BLOCK entries, R rows drawn the same way,
C candidates. The parts are equally long on all ranks, in rank order; what pads the vocabulary's end is -inf.

Probabilities are ``exp((logit - max) / temperature)`` in float32, summed in float64 by blocks that begin at the edge of
the rank's part. Another number of ranks makes other partial sums of the same terms. They differ by about 1e-16 of the
total, and the token only where the uniform number falls between them, about once in 1e12 draws. Min-p asks whether
``(logit - max) / temperature`` reaches ``log(min_p)``, without the exponential: subtraction and division round alike
everywhere, so the same tokens pass on every device. It needs no more than the maximum, and gathers nothing.
Exponentials differ between devices and backends in the last bits of float32; all ranks use the same.

Cost for 64 x 32000 float32 logits, on one thread of an AMD EPYC with torch 2.13: greedy 0.8 ms; an unrestricted draw
5.6 (exp takes 2.1 of it, the float64 sums 1.1; a cumulative sum over the vocabulary would take 21); top-k of 50 about
10; top-p alone 16 where 64 tokens reach it, but 300 where only a sort of the whole vocabulary does, as with random
weights. bfloat16 logits add up to 1 ms. Work is done some rows at a time, or most of the time would go into fresh
pages of memory.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.errors import InputError
from kernels import Backend, logit_blocks
from kernels.logit_blocks import BLOCK

# Entries worked on at a time, most often as a float32 copy. On a CPU they stay in its second-level cache; elsewhere
# this bounds the memory.
CHUNK = {"cpu": 2**18}
CHUNK_ELSEWHERE = 2**26
NUCLEUS_CANDIDATES = (64, 512)  # top-p alone tries this many before it takes the whole vocabulary
MAX_LOGPROBS = 20


class NotFiniteError(RuntimeError):
    """Logits that no token can be chosen from."""

    def __init__(self, row: int):
        super().__init__(f"row {row}: no token can be chosen, its logits hold NaN or have no finite maximum")
        self.row = row


class Ranks(Protocol):
    """What sampling needs of a tensor-parallel group."""

    rank: int
    size: int

    def all_gather(self, tensor: Tensor) -> Tensor:
        """``(size, *tensor.shape)``, stacked in rank order."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one prompt are chosen and when they end. Raises InputError for a value that is not accepted."""

    n: int = 1  # samples of the prompt
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # keep the fewest tokens whose probabilities reach this; 1 keeps all
    top_k: int = 0  # keep this many tokens; 0 keeps all (-1 is read as 0)
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    logprobs: int | None = None  # of each token that was chosen, and of so many of the likeliest, up to MAX_LOGPROBS
    min_p: float = 0.0  # drop tokens less probable than this times the likeliest one; 0 keeps all
    stop: str | tuple[str, ...] = ()  # texts that end a sequence where they first occur in what it generated
    include_stop_str_in_output: bool = False  # whether the text ends after the stop string, or before it
    prompt_logprobs: int | None = None  # likewise of each token of the prompt

    def __post_init__(self):
        whole = "an integer of 1 or more"
        self._check("n", _is_int(self.n) and self.n >= 1, whole, "ask for one sample or drop the prompt")
        self._check("max_tokens", _is_int(self.max_tokens) and self.max_tokens >= 1, whole, "ask for one token or more")
        # Outside these bounds float32 division by the temperature loses the distribution.
        warm = _is_real(self.temperature) and (self.temperature == 0 or 1e-5 <= self.temperature <= 1e5)
        self._check("temperature", warm, "0 (greedy) or a number from 1e-5 to 1e5", "use 0 for the likeliest token")
        in_range = _is_real(self.top_p) and 0 < self.top_p <= 1
        self._check("top_p", in_range, "a number above 0 and up to 1", "use 1 to keep all tokens")
        self._check("top_k", _is_int(self.top_k) and self.top_k >= -1, "an integer of 1 or more, or 0 for off", "use 0")
        self._check("ignore_eos", isinstance(self.ignore_eos, bool), "True or False", "use one of these")
        in_range = _is_int(self.seed) and 0 <= self.seed < 2**63
        self._check("seed", in_range, "an integer from 0 to 2**63 - 1", "use one of these")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            known = count is None or (_is_int(count) and 0 <= count <= MAX_LOGPROBS)
            accepted = f"None, or an integer from 0 (the token's own alone) to {MAX_LOGPROBS}"
            self._check(name, known, accepted, "use one of these")
        in_range = _is_real(self.min_p) and 0 <= self.min_p <= 1
        self._check("min_p", in_range, "a number from 0 to 1", "use 0 to keep all tokens")
        listed = isinstance(self.stop, str | list | tuple | set | frozenset)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop) if listed else ()
        listed = listed and all(isinstance(text, str) and text for text in stop)
        self._check("stop", listed, "a text or a list of texts, none of them empty", "use () for none")
        known = isinstance(self.include_stop_str_in_output, bool)
        self._check("include_stop_str_in_output", known, "True or False", "use one of these")
        listed = isinstance(self.stop_token_ids, list | tuple | set | frozenset)
        listed = listed and all(_is_int(token) and token >= 0 for token in self.stop_token_ids)
        self._check("stop_token_ids", listed, "a list of token ids, integers of 0 or more", "use () for none")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        object.__setattr__(self, "stop", stop)

    def _check(self, name: str, good: bool, accepted: str, advice: str) -> None:
        if not good:
            raise InputError(f"{name}: got {getattr(self, name)!r}; accepted: {accepted}; {advice}")


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class RowParams:
    """The sampling parameters of a batch's rows, made once for as long as the rows stay the same."""

    temperature: Tensor  # (B,) float32
    top_k: Tensor  # (B,) int64, 0 keeps all
    top_p: Tensor  # (B,) float64
    log_min_p: Tensor | None  # (B,) float32, -inf keeps all; None: no row has a min-p
    max_top_k: int
    # Row numbers, ascending, by how they are drawn. Each row is in exactly one of these.
    greedy: Tensor
    unrestricted: Tensor  # neither top-k nor top-p
    truncated: Tensor  # top-k, perhaps with top-p
    nucleus: Tensor  # top-p without top-k

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> "RowParams":
        """One entry of ``params`` for each row, in the rows' order."""
        kinds: dict[str, list[int]] = {"greedy": [], "unrestricted": [], "truncated": [], "nucleus": []}
        for row, p in enumerate(params):
            if p.temperature == 0:
                kind = "greedy"
            elif p.top_k > 0:
                kind = "truncated"
            else:
                kind = "nucleus" if p.top_p < 1 else "unrestricted"
            kinds[kind].append(row)
        log_min_p = [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params]
        any_min_p = any(p.min_p > 0 for p in params)
        return cls(
            temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
            top_k=torch.tensor([p.top_k for p in params], dtype=torch.int64, device=device),
            top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
            log_min_p=torch.tensor(log_min_p, dtype=torch.float32, device=device) if any_min_p else None,
            max_top_k=max((params[row].top_k for row in kinds["truncated"]), default=0),
            **{kind: torch.tensor(rows, dtype=torch.int64, device=device) for kind, rows in kinds.items()},
        )


# --- the uniform numbers ---


def prompt_hash(tokens: Sequence[int]) -> bytes:
    """16 bytes that stand for a prompt's tokens (list or array), the same on every machine."""
    return hashlib.blake2b(np.asarray(tokens, dtype="<i8").tobytes(), digest_size=16).digest()


def row_key(seed: int, prompt: bytes, occurrence: int, sample: int) -> int:
    """The 64-bit key (signed) of a row's stream of uniform numbers.

    ``prompt`` is the ``prompt_hash``; ``occurrence`` counts the equal prompts with equal parameters before this one in
    the caller's list.
    """
    assert isinstance(prompt, bytes) and len(prompt) == 16, "row_key takes the prompt's hash, not its tokens"
    text = b"".join(part.to_bytes(8, "little") for part in (seed, occurrence, sample)) + prompt
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def uniforms(keys: Tensor, steps: Tensor) -> Tensor:
    """A number in [0, 1) for each row and step: ``(B,)`` int64 keys and steps to ``(B,)`` float64.

    The ``steps``-th output of SplitMix64 seeded with the key (Steele, Lea and Flood, Fast splittable pseudorandom
    number generators, 2014): a counter goes through a bijective mixer, so any step is reached without those before it.
    Integer arithmetic modulo 2**64 alone, hence the same bits on every device.
    """
    z = keys + (steps + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 11).double() * 2.0**-53


def _signed(word: int) -> int:
    """The int64 with the bits of a uint64."""
    return word - 2**64 if word >= 2**63 else word


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """A logical shift: the arithmetic shift of int64 copies the sign into the top, which the mask clears."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


# --- choosing tokens ---


def greedy(logits: Tensor, vocab_start: int, group: Ranks, backend: Backend | None = None) -> Tensor:
    """The likeliest token of each row, ties to the lowest id: ``(B, V)`` of any float type to ``(B,)`` int64.

    ``vocab_start`` is the id of the rank's first entry; ``backend`` runs the passes over all logits. Raises
    NotFiniteError for a row that holds NaN or no finite maximum. One collective, of 8 bytes a row.
    """
    return _checked(_greedy(_Shard.of(logits, vocab_start, group, backend)))


def sample(
    logits: Tensor,
    params: RowParams,
    uniforms: Tensor,
    vocab_start: int,
    group: Ranks,
    backend: Backend | None = None,
) -> Tensor:
    """The next token of each row: ``(B, V)`` logits of any float type to ``(B,)`` int64 ids.

    In the order of transformers: temperature, top-k (of tied tokens the lowest ids are kept, exactly k in all), top-p
    of what is left, renormalised (the token that reaches ``top_p`` is kept), min-p, then one draw with ``uniforms``,
    ``(B,)`` float64 in [0, 1). Rows of temperature 0 are greedy. ``backend`` runs the passes over all logits. Raises
    NotFiniteError for a row that holds NaN or no finite maximum.

    Collectives: three of 8 bytes a row or less for rows with neither top-k nor top-p; one of 8 bytes a candidate for
    top-k rows; the same and two small ones for top-p rows, again with more candidates for rows whose top-p set those
    do not hold.
    """
    assert logits.shape[0] == len(uniforms) == len(params.temperature)
    shard = _Shard.of(logits, vocab_start, group, backend)
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if len(params.greedy):
        tokens[params.greedy] = _greedy(shard.select(params.greedy))
    for rows, draw in (
        (params.unrestricted, _draw_unrestricted),
        (params.truncated, _draw_truncated),
        (params.nucleus, _draw_nucleus),
    ):
        if len(rows):
            tokens[rows] = draw(shard.select(rows), _RowDraws.of(params, uniforms, rows))
    return _checked(tokens)


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of B rows, without temperature, and of each row's C likeliest tokens, best first."""

    chosen: Tensor  # (B,) float32
    top_ids: Tensor  # (B, C) int64, ties to the lowest id; those at -inf may be beyond the vocabulary
    top: Tensor  # (B, C) float32


def logprobs(
    logits: Tensor, tokens: Tensor, count: int, vocab_start: int, group: Ranks, backend: Backend | None = None
) -> Logprobs:
    """The log-softmax of each row's chosen token and ``count`` likeliest ones: ``(B, V)`` logits, ``(B,)`` ids.

    NaN in a row whose logits hold NaN or no finite maximum. One collective of 8 bytes a row; one more of 8 bytes a row
    and likely token where ``count`` is not 0.
    """
    values = logits.float()
    here = tokens - vocab_start
    held = (here >= 0) & (here < values.shape[1])
    chosen = values.gather(1, here.clamp(0, values.shape[1] - 1)[:, None])[:, 0].masked_fill(~held, -math.inf)
    parts = group.all_gather(torch.stack([chosen, values.logsumexp(-1)]))  # (W, 2, B)
    chosen, total = parts[:, 0].amax(0), parts[:, 1].logsumexp(0)
    total = total.masked_fill(~total.isfinite(), math.nan)
    if count > 0:
        top, top_ids, _ = _candidates(_Shard.of(logits, vocab_start, group, backend), count)
    else:
        top, top_ids = chosen.new_empty(len(tokens), 0), tokens.new_empty(len(tokens), 0)
    return Logprobs(chosen - total, top_ids, top - total[:, None])


@dataclass(frozen=True)
class _Shard:
    """The rank's part of R rows of logits; every method of drawing starts from the maxima of its blocks."""

    logits: Tensor  # (B, V)
    rows: Tensor  # (R,) the rows meant, ascending: as many as there are means all, in place
    maxima: Tensor  # (R, N) float32
    vocab_start: int
    group: Ranks
    backend: Backend | None

    @classmethod
    def of(cls, logits: Tensor, vocab_start: int, group: Ranks, backend: Backend | None) -> "_Shard":
        rows = torch.arange(logits.shape[0], device=logits.device)
        maxima = torch.cat([logit_blocks.block_maxima(logits[part], backend) for part in _chunks(logits, len(rows))])
        return cls(logits, rows, maxima, vocab_start, group, backend)

    def select(self, rows: Tensor) -> "_Shard":
        """The part that belongs to ``rows``, positions among this one's rows."""
        return replace(self, rows=self.rows[rows], maxima=self.maxima[rows])

    def block_masses(self, peak: Tensor, temperature: Tensor, log_min_p: Tensor | None) -> Tensor:
        """Sums of weights by block, (R, N) float64; the arguments are (R,)."""
        is_whole = len(self.rows) == len(self.logits)
        masses = [
            logit_blocks.block_masses(
                *((self.logits[part], None) if is_whole else (self.logits, self.rows[part])),
                *(peak[part], temperature[part], None if log_min_p is None else log_min_p[part], self.backend),
            )
            for part in _chunks(self.logits, len(self.rows))
        ]
        return torch.cat(masses)

    def entries(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """``(values float32, ids)`` of the given blocks of each row: (R, n) to (R, n * BLOCK), -inf beyond V."""
        inside = torch.arange(BLOCK, device=blocks.device)
        columns = (blocks[:, :, None] * BLOCK + inside).flatten(1)
        width = self.logits.shape[1]
        values = self.logits[self.rows[:, None], columns.clamp(max=width - 1)].float()
        return values.masked_fill_(columns >= width, -math.inf), self.vocab_start + columns


def _chunks(logits: Tensor, num_rows: int) -> Iterator[slice]:
    """Of as many rows of ``logits`` (B, V), those that are worked on at a time."""
    step = max(1, CHUNK.get(logits.device.type, CHUNK_ELSEWHERE) // logits.shape[1])
    return (slice(begin, begin + step) for begin in range(0, num_rows, step))


@dataclass(frozen=True)
class _RowDraws:
    """What decides the draws of R rows, beside their logits."""

    temperature: Tensor  # (R,)
    top_k: Tensor  # (R,)
    top_p: Tensor  # (R,)
    log_min_p: Tensor | None  # (R,)
    uniforms: Tensor  # (R,)
    max_top_k: int

    @classmethod
    def of(cls, params: RowParams, uniforms: Tensor, rows: Tensor) -> "_RowDraws":
        log_min_p = None if params.log_min_p is None else params.log_min_p[rows]
        by_row = params.temperature[rows], params.top_k[rows], params.top_p[rows], log_min_p, uniforms[rows]
        return cls(*by_row, params.max_top_k)

    def select(self, rows: Tensor) -> "_RowDraws":
        """Those of ``rows``, positions among these."""
        log_min_p = None if self.log_min_p is None else self.log_min_p[rows]
        by_row = self.temperature[rows], self.top_k[rows], self.top_p[rows], log_min_p, self.uniforms[rows]
        return _RowDraws(*by_row, self.max_top_k)


def _checked(tokens: Tensor) -> Tensor:
    """``tokens``, unless one is the -1 that stands for unusable logits. The one wait for the device in a choice."""
    if bool((tokens < 0).any()):
        raise NotFiniteError(int((tokens < 0).nonzero()[0]))
    return tokens


def _greedy(shard: _Shard) -> Tensor:
    best, block = shard.maxima.max(-1)  # the first of equal maxima, in both steps
    values, ids = shard.entries(block[:, None])
    keys = _sort_keys(best, ids.gather(1, values.max(-1).indices[:, None])[:, 0])
    values, tokens = _from_sort_keys(shard.group.all_gather(keys).amax(0))
    return torch.where(values.isfinite(), tokens, -1)


def _draw_unrestricted(shard: _Shard, draws: _RowDraws) -> Tensor:
    """Three narrowing searches: which rank, which of its blocks, which entry of that block."""
    peak, block_mass, rank_mass = _masses(shard, draws.temperature, draws.log_min_p)
    owner, rest = _locate(rank_mass, draws.uniforms * rank_mass.sum(-1))
    # A rank that does not own the draw goes on with the same rest, and finds a token that nobody asks for.
    block, rest = _locate(block_mass, rest)
    values, ids = shard.entries(block[:, None])
    by_row = peak, draws.temperature, draws.log_min_p
    inside, _ = _locate(logit_blocks.block_masses(values, None, *by_row, shard.backend, block=1), rest)
    found = shard.group.all_gather(ids.gather(1, inside[:, None])[:, 0])  # (W, R)
    return torch.where(peak.isfinite(), found.gather(0, owner[None])[0], -1)


def _draw_truncated(shard: _Shard, draws: _RowDraws) -> Tensor:
    values, ids, peak = _candidates(shard, draws.max_top_k)
    exponents = logit_blocks.exponents(values, peak, draws.temperature)
    ranking = torch.arange(exponents.shape[1], device=exponents.device)
    exponents.masked_fill_(ranking >= draws.top_k[:, None], -math.inf)
    needed = draws.top_p * exponents.exp().double().sum(-1)
    return torch.where(peak.isfinite(), _draw_sorted(exponents, ids, needed, draws), -1)


def _draw_nucleus(shard: _Shard, draws: _RowDraws) -> Tensor:
    """Takes the fewest candidates that hold all that the row can draw.

    Those are its top-p set, and the mass of the whole row tells when they do; or, if that comes sooner, all that min-p
    leaves.
    """
    peak, _, rank_mass = _masses(shard, draws.temperature)
    needed = draws.top_p * rank_mass.sum(-1)
    everything = shard.logits.shape[1] * shard.group.size
    tokens = torch.full_like(draws.top_k, -1)
    left = peak.isfinite().nonzero()[:, 0]
    for count in (*NUCLEUS_CANDIDATES, everything):
        values, ids, _ = _candidates(shard.select(left), count)
        exponents = logit_blocks.exponents(values, peak[left], draws.temperature[left])
        # All ranks decide alike: they decide on what was gathered.
        done = (exponents.exp().double().sum(-1) >= needed[left]) | (count >= everything)
        if draws.log_min_p is not None:
            done |= exponents[:, -1] < draws.log_min_p[left]
        solved = left[done]
        tokens[solved] = _draw_sorted(exponents[done], ids[done], needed[solved], draws.select(solved))
        left = left[~done]
        if len(left) == 0:
            break
    return tokens


def _masses(shard: _Shard, temperature: Tensor, log_min_p: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``(peak (R,) float32, sums of weights by block (R, N) and by rank (R, W) in float64)``."""
    peak = shard.group.all_gather(shard.maxima.amax(-1)).amax(0)
    block_mass = shard.block_masses(peak, temperature, log_min_p)
    return peak, block_mass, shard.group.all_gather(block_mass.sum(-1)).T


def _locate(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's cumulative sum of ``weights`` (R, n), float64, first exceeds ``target`` (R,).

    Returns the index and what is left of the target there, at least 0. The target is kept below the sum, which rounding
    may have let it reach, so an entry of weight 0 is found only in a row of zeros.
    """
    cumulative = weights.cumsum(-1)
    target = torch.minimum(target, torch.nextafter(cumulative[:, -1], torch.zeros_like(target)))
    index = (cumulative <= target[:, None]).sum(-1).clamp_(max=weights.shape[1] - 1)
    before = torch.where(index > 0, cumulative.gather(1, (index - 1).clamp_(min=0)[:, None])[:, 0], 0.0)
    return index, target - before


def _draw_sorted(exponents: Tensor, ids: Tensor, needed: Tensor, draws: _RowDraws) -> Tensor:
    """A draw from the fewest leading candidates that weigh ``needed`` (R,), less those that min-p drops.

    ``exponents`` and ``ids`` are (R, C), best first.
    """
    cumulative = exponents.exp().double().cumsum(-1)
    before = torch.nn.functional.pad(cumulative[:, :-1], (1, 0))
    kept = logit_blocks.weights(exponents, draws.log_min_p).double().masked_fill_(before >= needed[:, None], 0)
    index, _ = _locate(kept, draws.uniforms * kept.sum(-1))
    return ids.gather(1, index[:, None])[:, 0]


def _candidates(shard: _Shard, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` best entries of each row over all ranks, best first, ties to the lowest id, fewer where V is short.

    Returns ``(values (R, C) float32, ids (R, C), peak (R,))``. The ``count`` blocks of the largest maxima hold a rank's
    ``count`` best entries: any other block has that many better entries before it, one in each of these.
    """
    blocks = shard.maxima.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    keys = _largest(_sort_keys(*shard.entries(blocks)), min(count, shard.logits.shape[1]))
    gathered = shard.group.all_gather(keys).transpose(0, 1).flatten(1)  # (R, W * C)
    values, tokens = _from_sort_keys(_largest(gathered, min(count, gathered.shape[1])))
    return values, tokens, values[:, 0]


def _largest(keys: Tensor, count: int) -> Tensor:
    """The ``count`` largest keys of each row, descending; a sort is the faster way to most of them."""
    if 4 * count < keys.shape[1]:
        return keys.topk(count).values
    return keys.sort(dim=-1, descending=True).values[:, :count]


def _sort_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that order (float32 value, lower id first) pairs; NaN is above everything. Both can be read back.

    The upper half holds the value's bits, those of negative numbers flipped, which makes them compare as integers.
    """
    bits = torch.where(values.isnan(), math.nan, values + 0.0).view(torch.int32)  # one NaN (positive), one zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32).bitwise_or_(0xFFFFFFFF - ids)


def _from_sort_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The ``(values, ids)`` of ``_sort_keys``."""
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)
