"""Hypothesis strategies for prompts that share prefixes in every way that the engine must handle.

Tests use them with ``SETTINGS``, so that every run draws the same examples.
"""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

BOS = 1

HARD_CASES = frozenset(
    {
        "uneven fan-out",
        "several roots",
        "ragged lengths",
        "identical prompts",
        "a prompt that is a prefix of another",
        "an empty suffix",
        "a root of one BOS token",
        "nothing shared",
        "one prompt",
        "depth 4",
        "fan-out 5",
        "a caller order that is not depth-first",
    }
)


@st.composite
def token_runs(draw, vocab_size: int, min_size: int, max_size: int):
    """A list of token ids, often repetitive, so that runs meant to differ begin alike at times."""
    alphabet = st.sampled_from([2, 3]) if draw(st.booleans()) else st.integers(0, vocab_size - 1)
    return draw(st.lists(alphabet, min_size=min_size, max_size=max_size))


@st.composite
def prompt_sets(draw, vocab_size: int = 32, max_run: int = 6, max_depth: int = 4, max_prompts: int = 16):
    """Prompts from a random tree: 1 to 3 roots, 1 to ``max_depth`` levels, fan-out 1 to 5, ragged, in any order.

    At times one prompt, or prompts that share nothing. Runs that happen to begin alike can make the tree that is
    found deeper. Returns a non-empty list of non-empty lists of token ids below ``vocab_size`` (at least 4).
    """
    kind = draw(st.sampled_from(["one prompt", "nothing shared", *["tree"] * 6]))
    if kind == "one prompt":
        return [draw(token_runs(vocab_size, 1, max_run))]
    if kind == "nothing shared":
        firsts = draw(st.lists(st.integers(0, vocab_size - 1), min_size=2, max_size=max_prompts, unique=True))
        return [[first] + draw(token_runs(vocab_size, 0, max_run)) for first in firsts]
    roots = st.lists(token_runs(vocab_size, 1, max_run), min_size=1, max_size=3)
    stems = [[BOS]] if draw(st.booleans()) else draw(roots)
    for _ in range(draw(st.integers(1, max_depth))):
        stems = _grow(draw, stems, token_runs(vocab_size, 0, max_run), max_prompts)
    return draw(st.permutations(stems)) if draw(st.booleans()) else stems


def _grow(draw, stems: list[list[int]], runs, limit: int) -> list[list[int]]:
    """Each stem continued 1 to 5 times; beyond ``limit`` results a stem is continued once."""
    grown: list[list[int]] = []
    for left, stem in zip(range(len(stems), 0, -1), stems):
        fan_out = min(draw(st.integers(1, 5)), max(1, limit - len(grown) - left + 1))
        grown += [stem + draw(runs) for _ in range(fan_out)]
    return grown


@st.composite
def level_sets(draw, vocab_size: int = 32, max_run: int = 6, max_prompts: int = 16):
    """``(levels, parents)`` for ``build_from_levels``: 1 to 5 levels, uneven and unordered parents, empty entries.

    Every sequence has a token, since the roots do; every entry of an upper level has something below it.
    """
    levels = [draw(st.lists(token_runs(vocab_size, 1, max_run), min_size=1, max_size=3))]
    parents = []
    for _ in range(draw(st.integers(0, 4))):
        owners = []
        for above in range(len(levels[-1])):
            room = max_prompts - len(owners) - (len(levels[-1]) - above) + 1
            owners += [above] * min(draw(st.integers(1, 5)), max(1, room))
        parents.append(draw(st.permutations(owners)))
        levels.append([draw(token_runs(vocab_size, 0, max_run)) for _ in owners])
    return levels, parents


@st.composite
def even_level_sets(draw, vocab_size: int = 32, max_run: int = 6, max_prompts: int = 16):
    """``(levels, None)`` for ``build_from_levels``: 1 to 5 levels, each a multiple of the one above, empty entries."""
    levels = [draw(st.lists(token_runs(vocab_size, 1, max_run), min_size=1, max_size=3))]
    for _ in range(draw(st.integers(0, 4))):
        count = len(levels[-1])
        fan_out = draw(st.integers(1, max(1, min(5, max_prompts // count))))
        levels.append([draw(token_runs(vocab_size, 0, max_run)) for _ in range(count * fan_out)])
    return levels, None


def hard_cases(prompts: list[list[int]], tree) -> set[str]:
    """Which of HARD_CASES occur in ``prompts`` and the ``PrefixTree`` built from them."""
    fan_outs = [len(_children(tree, node.index)) for node in tree.nodes]
    distinct = {tuple(prompt) for prompt in prompts}
    occurs = {
        "uneven fan-out": len(set(fan_outs)) > 1,
        "several roots": sum(node.parent == -1 for node in tree.nodes) > 1,
        "ragged lengths": len({len(prompt) for prompt in prompts}) > 1,
        "identical prompts": len(distinct) < len(prompts),
        "a prompt that is a prefix of another": any(a != b and b[: len(a)] == a for a in distinct for b in distinct),
        "an empty suffix": any(len(suffix) == 0 for suffix in tree.suffixes),
        "a root of one BOS token": any(n.parent == -1 and n.tokens.tolist() == [BOS] for n in tree.nodes),
        "nothing shared": len(prompts) > 1 and not tree.nodes,
        "one prompt": len(prompts) == 1,
        "depth 4": any(node.depth == 3 for node in tree.nodes),
        "fan-out 5": 5 in fan_outs,
        "a caller order that is not depth-first": list(tree.order) != sorted(tree.order),
    }
    assert occurs.keys() == HARD_CASES
    return {name for name, found in occurs.items() if found}


def _children(tree, node: int) -> list[int]:
    """What hangs directly below a node: child nodes, and a -1 for each sequence whose suffix follows it."""
    return [n.index for n in tree.nodes if n.parent == node] + [-1 for leaf in tree.leaf_nodes if leaf == node]
