"""Which sparse pattern suits a head: each candidate is tried on the queries, keys and values of real prompts.

The idea is the kernel-aware search of MInference (arXiv:2407.02490, section 3.2): of the patterns whose work is within
one budget, a head gets the one whose output is nearest to that of dense attention.

Shapes: T queries, S keys of the arena, H query heads of this rank, D head dimension.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, fields

import torch

from engine.errors import InputError
from engine.prefill.head_config import DEFAULT_PATTERN
from engine.prefill.method import parse_prefill
from kernels import AttentionPlan
from kernels.sparse import AShape, BlockSparse, Dense, Pattern, SparsePlan, VerticalSlash, lower, num_pairs, num_seen

# Those of the original's search: about equal in cost to each other at the lengths that it is for.
DEFAULT_CANDIDATES = (
    "a_shape:n_init=100:n_local=800,"
    "vertical_slash:num_vertical=30:num_slash=800,"
    "vertical_slash:num_vertical=100:num_slash=750,"
    "vertical_slash:num_vertical=500:num_slash=700,"
    "vertical_slash:num_vertical=3500:num_slash=100,"
    f"vertical_slash:num_vertical={DEFAULT_PATTERN.num_vertical}:num_slash={DEFAULT_PATTERN.num_slash},"
    "block_sparse:num_blocks=100"
)
_WRITABLE = (AShape, VerticalSlash, BlockSparse, Dense)  # what files with a pattern for each head have types for
# Decimals of errors that are compared: what differs by less differs by the order of additions.
_ERROR_DECIMALS = 4


@dataclass(frozen=True)
class Candidate:
    name: str  # of the prefill method
    pattern: Pattern

    @property
    def text(self) -> str:
        """As ``parse_prefill`` takes it, all numbers spelled out."""
        numbers = (f"{field.name}={getattr(self.pattern, field.name)}" for field in fields(self.pattern))
        return ":".join([self.name, *numbers])


@dataclass(frozen=True)
class HeadScore:
    """How one pattern did for one head, on one prompt or on average."""

    error: float  # the norm of the difference to dense attention's output, of all queries, over the norm of that output
    recall: float  # the part of dense attention's probability that falls on the pattern's keys, on average over queries
    density: float  # the part of all pairs of a query and a key, under causality, that the pattern looks at


LayerScores = tuple[tuple[HeadScore, ...], ...]  # of each candidate, for each head
Place = tuple[int, int]  # a prompt and a layer


@dataclass(frozen=True)
class Choice:
    """A head's pattern, with its mean scores over the prompts."""

    candidate: Candidate
    score: HeadScore
    is_within_budget: bool


def parse_candidates(text: str) -> tuple[Candidate, ...]:
    """The patterns of a list with commas. Raises InputError for what is no pattern, or cannot be written to a file."""
    candidates: list[Candidate] = []
    for part in text.split(","):
        method = parse_prefill(part)
        pattern = Dense() if method.is_dense else method.pattern
        if not isinstance(pattern, _WRITABLE) or "dense_below" in method.text:
            raise InputError(
                f"candidate {method.text!r} cannot be a head's; accepted: a_shape, vertical_slash, block_sparse or "
                "dense, without dense_below"
            )
        if any(pattern == other.pattern for other in candidates):
            raise InputError(f"candidate {method.text!r} is there twice; accepted: each pattern once; leave one out")
        candidates.append(Candidate(method.name, pattern))
    return tuple(candidates)


class SearchPlan:
    """The attention of a forward pass of one prompt: dense, and in each of ``layers`` all candidates beside it, whose
    scores ``on_scores`` is given with the layer's number. ``on_candidate`` is called after each of them."""

    def __init__(
        self,
        dense: AttentionPlan,
        sparse: SparsePlan,
        candidates: Sequence[Candidate],
        layers: Set[int],
        on_scores: Callable[[int, LayerScores], None],
        on_candidate: Callable[[], None],
    ):
        self._dense, self._sparse, self._candidates, self._layers = dense, sparse, candidates, layers
        self._on_scores, self._on_candidate = on_scores, on_candidate

    def run(
        self, q_THD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, scale: float, layer: int
    ) -> torch.Tensor:
        """``(T, H, D)`` of dense attention, in the queries' dtype."""
        out, lse = self._dense.run_state(q_THD, k_SHD, v_SHD, scale)
        if layer in self._layers:
            wide, scores = out.float(), []
            for candidate in self._candidates:
                scores.append(self._score(candidate.pattern, q_THD, k_SHD, v_SHD, scale, wide, lse))
                self._on_candidate()
            self._on_scores(layer, tuple(scores))
        return out.to(q_THD.dtype)

    def _score(self, pattern, q_THD, k_SHD, v_SHD, scale, dense_THD, dense_lse_TH) -> tuple[HeadScore, ...]:
        rows = self._sparse.rows
        index = lower([pattern] * q_THD.shape[1], q_THD, k_SHD, rows, scale)
        out_THD, lse_TH = self._sparse.run(q_THD, k_SHD, v_SHD, index, scale)
        difference, norm = (torch.linalg.vector_norm(x, dim=(0, 2)) for x in (out_THD.float() - dense_THD, dense_THD))
        error = difference / norm.clamp(min=torch.finfo(norm.dtype).tiny)  # values that are all 0 have no error
        recall = (lse_TH - dense_lse_TH).exp().clamp(max=1).mean(0)  # rounding alone makes it more than 1
        density = num_seen(index, rows).double() / num_pairs(rows)
        return tuple(HeadScore(*of_head) for of_head in zip(error.tolist(), recall.tolist(), density.tolist()))


def choose(candidates: Sequence[Candidate], scores: Sequence[HeadScore], max_density: float) -> Choice:
    """Of the candidates that look at ``max_density`` of the pairs or less the one of least error, of equal ones that of
    least density, then the first. Where there is none within that budget, the one of least density.

    ``scores`` are the candidates' for one head.
    """
    allowed = [number for number, score in enumerate(scores) if score.density <= max_density]
    if allowed:
        best = min(allowed, key=lambda i: (round(scores[i].error, _ERROR_DECIMALS), scores[i].density))
    else:
        best = min(range(len(scores)), key=lambda i: (scores[i].density, round(scores[i].error, _ERROR_DECIMALS)))
    return Choice(candidates[best], scores[best], bool(allowed))


def choose_all(
    candidates: Sequence[Candidate],
    scores: Mapping[Place, LayerScores],
    num_prompts: int,
    num_layers: int,
    max_density: float,
) -> list[list[Choice]]:
    """The choice of each head of each layer, by its mean scores over the prompts."""
    choices = []
    for layer in range(num_layers):
        of_prompts = [scores[prompt, layer] for prompt in range(num_prompts)]
        num_heads = len(of_prompts[0][0])
        choices.append(
            [
                choose(
                    candidates,
                    [mean([found[i][head] for found in of_prompts]) for i in range(len(candidates))],
                    max_density,
                )
                for head in range(num_heads)
            ]
        )
    return choices


def mean(scores: Sequence[HeadScore]) -> HeadScore:
    number = len(scores)
    return HeadScore(
        sum(score.error for score in scores) / number,
        sum(score.recall for score in scores) / number,
        sum(score.density for score in scores) / number,
    )
