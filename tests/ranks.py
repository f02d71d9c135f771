"""Several tensor-parallel ranks in one process, as threads, with the interface of ``engine.distributed.TPGroup``."""

import threading
from collections.abc import Callable

import torch

from engine.distributed import TPGroup


class World:
    """``size`` ranks. The same groups serve one ``run`` after another, so that models can be kept between them."""

    def __init__(self, size: int):
        self.size = size
        self.groups = [ThreadGroup(self, rank) for rank in range(size)]
        self._barrier = threading.Barrier(size, timeout=60)
        # Taken in turns: a rank that writes to one has left the barrier that all ranks reached after reading it.
        self._slots = [[None] * size, [None] * size]

    def run(self, work: Callable[["ThreadGroup"], object]) -> list:
        """``work(group)`` on every rank; the results in rank order. The first rank's error that is raised is raised."""
        results, errors = [None] * self.size, []

        def target(rank: int) -> None:
            try:
                results[rank] = work(self.groups[rank])
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()  # the others, who wait for this rank, raise too

        threads = [threading.Thread(target=target, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            self._barrier.reset()
            for group in self.groups:
                group.turn = 0
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return results

    def exchange(self, rank: int, turn: int, operation: tuple, value) -> list:
        """Every rank's value, in rank order. All ranks must ask for the same operation."""
        slots = self._slots[turn]
        slots[rank] = (operation, value)
        self._barrier.wait()
        assert all(other == operation for other, _ in slots), f"ranks do different things: {[o for o, _ in slots]}"
        return [value for _, value in slots]


class ThreadGroup(TPGroup):
    """One rank's view of a World. Collectives are in lock-step and sum in rank order."""

    def __init__(self, world: World, rank: int):
        super().__init__(rank, world.size)
        self.world, self.turn = world, 0

    def _exchange(self, operation: tuple, value) -> list:
        self.turn = 1 - self.turn
        return self.world.exchange(self.rank, self.turn, operation, value)

    def _exchange_tensors(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        # A copy: the caller may go on to change its tensor while others still read this one.
        return self._exchange((name, tensor.shape, tensor.dtype), tensor.clone())

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = self._exchange_tensors("all_reduce", tensor)
        tensor.copy_(parts[0])
        for part in parts[1:]:
            tensor += part
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange_tensors("all_gather", tensor))

    def broadcast(self, value):
        return self._exchange(("broadcast",), value)[0]

    def gather_objects(self, value) -> list:
        return self._exchange(("gather_objects",), value)

    def barrier(self) -> None:
        self._exchange(("barrier",), None)

    def close(self) -> None:
        """Nothing was opened."""


def run_ranks(world_size: int, work: Callable[[ThreadGroup], object]) -> list:
    """``work(group)`` on each of ``world_size`` ranks; the results in rank order."""
    return World(world_size).run(work)
