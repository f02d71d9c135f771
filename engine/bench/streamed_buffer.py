"""A buffer that is there to be read from end to end: to see how fast memory is, or to drive all else from caches."""

import torch


class StreamedBuffer:
    def __init__(self, num_bytes: int, device: torch.device):
        self._left, self._right = torch.ones(2, num_bytes // 8, dtype=torch.float32, device=device)

    @property
    def num_bytes(self) -> int:
        return self._left.nbytes + self._right.nbytes

    def read(self) -> None:
        # A dot product writes nothing, and of the reductions tried on CPU it came nearest to the memory's rate.
        torch.dot(self._left, self._right)
