"""Shared levels that are kept between calls: appended, truncated, emptied, and found again by what they hold.

Shapes: n prompts of a level, N nodes of a tree.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from engine.arena import Arena
from engine.attention import AttentionMethod, Keeps, get_method
from engine.errors import InputError
from engine.executor import Executor
from engine.finiteness import first_not_finite
from engine.model import Transformer
from engine.prefix_tree import PrefixTree, build_from_levels
from engine.tree_room import ResidentNode, TreeRoom


class SharedLevels:
    """Kept levels, as the caller laid them out, and where their nodes lie in the arena.

    Nodes are known by the tokens on the path from the root, so a level that holds the same prompt twice keeps it once.
    """

    def __init__(self, model: Transformer, arena: Arena):
        self._model, self._arena = model, arena
        self.levels: list[list[np.ndarray]] = []
        self.parents: list[list[int]] = []  # of each level but the first
        self._nodes: dict[bytes, ResidentNode] = {}
        self._methods: list[AttentionMethod] = []  # that computed each level
        self._rope_length = 0  # of the sequences that the levels are for

    def check(self, method: AttentionMethod) -> None:
        """Raises InputError when ``method`` cannot continue what is kept."""
        keyless = [m.name for m in self._methods if m.keeps is Keeps.NOTHING]
        if method.keeps is not Keeps.NOTHING and keyless:
            raise InputError(
                f"kept levels were computed with attention {keyless[0]!r}, which keeps no keys for {method.name!r} to "
                "read; empty or truncate them first, or use shared_cache_op='wipe'"
            )

    def check_rope_length(self, rope_length: int, what: str) -> None:
        """Raises InputError when sequences of this ``rope_length`` cannot continue what is kept."""
        if self.levels and rope_length != self._rope_length:
            lengths = (rope_length, self._rope_length)
            ours, theirs = (f"RoPE of length {n}" if n else "the original RoPE" for n in lengths)
            raise InputError(
                f"{what} is planned with {ours}, but the kept levels are rotated by {theirs}; accepted: one for all; "
                "give the same planned_length when they are appended and continued, or empty them first"
            )

    def resident(self, tree: PrefixTree) -> dict[int, ResidentNode]:
        """The nodes of ``tree`` that are kept, by index."""
        return {i: self._nodes[key] for i, key in enumerate(_path_keys(tree)) if key in self._nodes}

    def above(
        self, num_prompts: int, parents: Sequence[int] | None
    ) -> tuple[list[list[np.ndarray]], list[list[int]]]:
        """The kept entries that ``num_prompts`` further ones continue, by level, and the parents of these and of the
        further ones. Raises InputError when they do not divide evenly, or name an entry that is not there."""
        if not self.levels:
            if parents is not None:
                raise InputError("parents were given for the first level, which continues nothing; leave them out")
            return [], []
        owners = self._owners(num_prompts, parents)
        levels, all_parents = [], []
        for level, above_level in zip(reversed(self.levels), [*reversed(self.parents), None], strict=True):
            named = sorted(set(owners))
            number = {entry: i for i, entry in enumerate(named)}
            levels.append([level[entry] for entry in named])
            all_parents.append([number[owner] for owner in owners])
            owners = [] if above_level is None else [above_level[entry] for entry in named]
        return levels[::-1], all_parents[::-1]

    def _owners(self, num_prompts: int, parents: Sequence[int] | None) -> list[int]:
        """The entry of the last level that each of ``num_prompts`` further ones continues."""
        count = len(self.levels[-1])
        if parents is None:
            return even_parents(count, num_prompts)
        if len(parents) != num_prompts:
            raise InputError(f"parents: got {len(parents)} for {num_prompts} prompts; accepted: one each; match them")
        for j, owner in enumerate(parents):
            if owner not in range(count):
                raise InputError(
                    f"parents: got {owner} for prompt {j}; accepted: 0 to {count - 1}, the entries of the last kept "
                    "level; correct it"
                )
        return list(parents)

    def tree_of_next(self, prompts: Sequence[Sequence[int]], parents: Sequence[int] | None) -> PrefixTree:
        """One more level and what is kept above it; every entry of it ends in one empty suffix."""
        levels, all_parents = self.above(len(prompts), parents)
        ends = [()] * len(prompts)
        return build_from_levels([*levels, prompts, ends], parents=[*all_parents, list(range(len(prompts)))])

    def append(
        self,
        tree: PrefixTree,
        prompts: Sequence[Sequence[int]],
        parents: Sequence[int] | None,
        method: AttentionMethod,
        rope_length: int,
    ) -> torch.Tensor:
        """Computes and keeps the nodes of ``tree_of_next(prompts, parents)``.

        Returns the hidden state after each entry's last token, (n, hidden), in the order of ``prompts``.
        """
        # The baseline, which has no node by itself, gets an exact level all the same.
        layout = method if method.keeps is not Keeps.HISTORIES else get_method("hydragen")
        rooms = np.zeros(tree.num_sequences, dtype=np.int64)
        resident = self.resident(tree)
        self._arena.begin_call()
        room = TreeRoom(self._arena, self._model, tree, layout, rooms, resident)
        try:
            hidden = self._prefill(tree, layout, room)
        except BaseException:
            room.expect_nan()
            room.close()
            raise
        one_of_each = {key: i for i, key in enumerate(_path_keys(tree)) if i not in resident}
        kept = room.hand_over(one_of_each.values())
        self._nodes |= {key: kept[i] for key, i in one_of_each.items()}
        room.close()
        if self.levels:
            self.parents.append(self._owners(len(prompts), parents))
        self.levels.append([np.asarray(entry, dtype=np.int64) for entry in prompts])
        self._methods.append(method)
        self._rope_length = rope_length
        return hidden[torch.from_numpy(np.argsort(tree.order)).to(hidden.device)]

    def _prefill(self, tree: PrefixTree, layout: AttentionMethod, room: TreeRoom) -> torch.Tensor:
        """The hidden states at the ends of all sequences, (B, hidden), which are finite."""
        executor = Executor(self._model, layout, tree, room.placement, room.node_hidden, None)
        hidden = []
        while room.num_waiting:
            sequences = room.admit(room.num_waiting, "the shared level")
            executor.cache = self._arena.cache if layout.keeps is not Keeps.NOTHING else None
            hidden.append(executor.prefill(sequences))
        hidden = torch.cat(hidden)
        self._check_finite(hidden, tree, layout)
        return hidden

    def _check_finite(self, hidden: torch.Tensor, tree: PrefixTree, layout: AttentionMethod) -> None:
        broken = (~hidden.isfinite().all(-1)).nonzero()
        if len(broken):
            i = int(broken[0])
            part = first_not_finite(self._model, layout, tree.sequence_tokens(i).tolist())
            raise InputError(
                f"entry {tree.order[i]} of the shared level is not finite at its end"
                f"{f': {part} is the first to give NaN or infinity' if part else ''}; accepted: levels whose numbers "
                "are finite; use a --dtype of wider range (bfloat16 or float32), or other weights"
            )

    def truncate(self, num_levels: int) -> None:
        """Keeps the first ``num_levels`` levels and drops the others."""
        if not 0 <= num_levels <= len(self.levels):
            raise InputError(f"cannot keep {num_levels} shared levels; accepted: 0 to {len(self.levels)}, as there are")
        self.levels, self.parents = self.levels[:num_levels], self.parents[: max(num_levels - 1, 0)]
        del self._methods[num_levels:]
        wanted = self._keys()
        for key in [key for key in self._nodes if key not in wanted]:
            node = self._nodes.pop(key)
            self._arena.free(node.slot, node.length)

    def _keys(self) -> set[bytes]:
        """Those of all entries of all levels."""
        keys: set[bytes] = set()
        above = [_NO_TOKENS]
        for level, owners in zip(self.levels, [[0] * len(self.levels[0]), *self.parents] if self.levels else []):
            above = [_key(above[owner], entry) for owner, entry in zip(owners, level, strict=True)]
            keys.update(above)
        return keys


def even_parents(num_above: int, num_below: int) -> list[int]:
    """The parent of each entry of a level that divides evenly over the level above. Raises InputError if uneven."""
    if num_below == 0 or num_below % num_above:
        raise InputError(
            f"{num_below} prompts do not divide evenly over the {num_above} of the level above; accepted: a multiple "
            f"of {num_above}; change the number, or name the parents"
        )
    return [j // (num_below // num_above) for j in range(num_below)]


_NO_TOKENS = b""  # the key of the empty path


def _key(above: bytes, tokens: np.ndarray) -> bytes:
    """A digest of the runs of tokens from the root down; an empty run adds nothing."""
    return hashlib.blake2b(above + tokens.tobytes(), digest_size=16).digest() if len(tokens) else above


def _path_keys(tree: PrefixTree) -> list[bytes]:
    """Each node's key."""
    keys: list[bytes] = []
    for node in tree.nodes:
        keys.append(_key(keys[node.parent] if node.parent >= 0 else _NO_TOKENS, node.tokens))
    return keys
