"""Room in the KV arena for the sequences of a tree, which come in depth-first order and leave in any.

What a sequence leaves is given to those that wait. Neighbours share the most, so the next one in depth-first order is
below a node that is there already as long as any such one waits, and a node leaves when nobody is left below it.

Shapes: N nodes, B sequences, R of them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from engine.activations import tree_activation_bytes
from engine.arena import Arena
from engine.attention import AttentionMethod, Keeps, Placement
from engine.attention.placement import equal_where_cheap
from engine.model import Transformer
from engine.prefix_tree import PrefixTree


@dataclass(frozen=True)
class ResidentNode:
    """A node whose keys and values are in the arena."""

    slot: int  # of its first token
    length: int  # in slots, none where nothing is kept
    hidden: torch.Tensor  # (hidden,): the normalised hidden state of its last token


@dataclass(frozen=True)
class _Need:
    """What letting some sequences in asks for."""

    new_nodes: np.ndarray  # those that are not there yet
    node_slots: list[int]
    sequence_slots: np.ndarray
    activation_bytes: int  # the most that a forward pass takes, theirs or one with all that run

    @property
    def ranges(self) -> list[int]:
        return [*self.node_slots, *self.sequence_slots.tolist()]


class TreeRoom:
    """Where the nodes and sequences of one tree lie; all ranks place alike.

    Args:
        rooms: (B,) slots that each sequence needs for its suffix and new tokens.
        kept: nodes, by index, that are in the arena already and stay there.
        extra_bytes: what a prefill takes beside what it is known to.
    """

    def __init__(
        self,
        arena: Arena,
        model: Transformer,
        tree: PrefixTree,
        method: AttentionMethod,
        rooms: np.ndarray,
        kept: Mapping[int, ResidentNode],
        extra_bytes: int = 0,
    ):
        self._extra_bytes = extra_bytes
        self._arena, self._model, self._tree = arena, model, tree
        self.placement = Placement(tree, method.keeps)
        # Of each node that is there. An Executor's prefill fills in those of nodes that were let in.
        self.node_hidden = {index: node.hidden for index, node in kept.items()}
        self.num_admitted = 0  # the first sequence that has not been let in
        self.running = np.empty(0, dtype=np.int64)  # ascending
        self._is_mine = np.zeros(len(tree.nodes), dtype=bool)  # nodes that were let in, and so are to be given back
        self._is_there = np.zeros(len(tree.nodes), dtype=bool)
        for index, node in kept.items():
            self.placement.node_starts[index] = node.slot
            self._is_there[index] = True
        slots = self.placement.slots_for(rooms)
        self._layouts = (equal_where_cheap(slots), slots)  # the first is better, the second asks for less
        self._may_hold_nan = False

    @property
    def num_waiting(self) -> int:
        return self._tree.num_sequences - self.num_admitted

    def admit(self, limit: int, what: str) -> np.ndarray:
        """The next sequences, at most ``limit``, as many as there is room for: ascending, now running and placed, as
        are the nodes above them. None while others run that take the room.

        Raises NoRoomError, naming ``what``, when the next one has no room though nothing else runs.
        """
        last = self._how_far(limit)
        if last == self.num_admitted:
            if len(self.running):
                return np.empty(0, dtype=np.int64)
            # What waits for the next one leaves no range that is long enough; the empty arena may have one.
            self._drop(np.flatnonzero(self._is_mine))
            last = max(self._how_far(limit), self.num_admitted + 1)
        return self._let_in(last, what)

    def skip(self) -> None:
        """The next sequence is not to be let in."""
        self.num_admitted += 1
        self._drop_unread()

    def release(self, sequences: np.ndarray) -> None:
        """Gives back what ``sequences`` (R,), which have ended, and nodes with none left below them took."""
        if len(sequences) == 0:
            return
        placement = self.placement
        for i in sequences.tolist():
            self._free(int(placement.sequence_starts[i]), int(placement.sequence_slots[i]))
        placement.sequence_starts[sequences], placement.sequence_slots[sequences] = -1, 0
        self.running = np.setdiff1d(self.running, sequences, assume_unique=True)
        self._drop_unread()

    def hand_over(self, nodes: Collection[int]) -> dict[int, ResidentNode]:
        """Nodes that are the caller's from now on, to be given back to the arena by him."""
        handed = {}
        for index in nodes:
            slots = self._node_slots(index)
            handed[index] = ResidentNode(int(self.placement.node_starts[index]), slots, self.node_hidden[index])
            self._is_mine[index] = False
        return handed

    def close(self) -> None:
        """Gives everything back that is left."""
        self.num_admitted = self._tree.num_sequences
        self.release(self.running)
        self._drop_unread()

    def expect_nan(self) -> None:
        """A computation failed: from now on what is given back is zeroed, for masked reads need every slot finite."""
        self._may_hold_nan = True

    def _how_far(self, limit: int) -> int:
        """The sequences from the next one up to here have room."""
        low, high = self.num_admitted, min(self.num_admitted + limit, self._tree.num_sequences)
        if self._fitting(high) is not None:
            return high
        while high - low > 1:  # low fits, or is none; high does not
            middle = (low + high) // 2
            if self._fitting(middle) is not None:
                low = middle
            else:
                high = middle
        return low

    def _fitting(self, last: int) -> _Need | None:
        """What the sequences from the next one up to ``last`` need, if there is room for it."""
        for slots in self._layouts:
            need = self._need(last, slots)
            if self._arena.fits(need.ranges, need.activation_bytes):
                return need
        return None

    def _need(self, last: int, slots: np.ndarray) -> _Need:
        tree, new = self._tree, slice(self.num_admitted, last)
        on_path = (tree.table.node_first < last) & (tree.table.node_last > self.num_admitted)
        new_nodes = np.flatnonzero(on_path & ~self._is_there)
        num_sequences = len(self.running) + last - self.num_admitted
        needed = tree_activation_bytes(self._model, tree, new_nodes, new, num_sequences)
        node_slots = [self._node_slots(i) for i in new_nodes.tolist()]
        return _Need(new_nodes, node_slots, slots[new], needed + self._extra_bytes)

    def _let_in(self, last: int, what: str) -> np.ndarray:
        need = self._fitting(last) or self._need(last, self._layouts[-1])
        starts = self._arena.allocate(need.ranges, what, need.activation_bytes, spare=len(self.running) > 0)
        placement, new = self.placement, slice(self.num_admitted, last)
        placement.sequence_starts[new] = starts[len(need.node_slots) :]
        placement.sequence_slots[new] = need.sequence_slots
        placement.node_starts[need.new_nodes] = starts[: len(need.node_slots)]
        if placement.keeps is Keeps.HISTORIES:  # computed in the range of the first of these sequences below it
            table, nodes = self._tree.table, need.new_nodes
            holders = np.maximum(table.node_first[nodes], self.num_admitted)
            placement.node_starts[nodes] = placement.sequence_starts[holders] + table.node_position[nodes]
        self._is_there[need.new_nodes] = self._is_mine[need.new_nodes] = True
        sequences = np.arange(self.num_admitted, last)
        self.running = np.append(self.running, sequences)
        self.num_admitted = last
        return sequences

    def _node_slots(self, index: int) -> int:
        """Slots of a node's own range."""
        return len(self._tree.nodes[index].tokens) if self.placement.keeps is Keeps.NODES else 0

    def _drop_unread(self) -> None:
        """Nodes leave that no sequence is going to read."""
        table, nodes = self._tree.table, np.flatnonzero(self._is_mine)
        first = np.searchsorted(self.running, table.node_first[nodes])
        is_read = first < np.searchsorted(self.running, table.node_last[nodes])
        if self.placement.keeps is Keeps.HISTORIES:  # it is there as long as one of those that run holds it
            held, holders = nodes[is_read], self.running[first[is_read]]
            self.placement.node_starts[held] = self.placement.sequence_starts[holders] + table.node_position[held]
        else:
            is_read |= table.node_last[nodes] > self.num_admitted
        self._drop(nodes[~is_read])

    def _drop(self, nodes: np.ndarray) -> None:
        for index in nodes.tolist():
            self._free(int(self.placement.node_starts[index]), self._node_slots(index))
            self.node_hidden.pop(index, None)  # it is not there where its prefill failed
        self.placement.node_starts[nodes] = -1
        self._is_there[nodes] = self._is_mine[nodes] = False

    def _free(self, start: int, slots: int) -> None:
        if self._may_hold_nan:
            self._arena.clear(start, slots)
        self._arena.free(start, slots)
