"""Exchanges between ranks that are threads here; ``test_distributed.py`` and the fault tests have real processes."""

import itertools
import mmap
import threading

import pytest
import torch

from engine import host_exchange
from engine.host_exchange import SLOT_BYTES, HostExchange, size_in_bytes


def run(size, work, while_waiting=lambda waited_s: None):
    """``work(exchange, rank)`` on every rank; what each returns, in rank order."""
    memory = mmap.mmap(-1, size_in_bytes(size))
    results, errors = [None] * size, []

    def target(rank):
        try:
            results[rank] = work(HostExchange(memory, rank, size, while_waiting), rank)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    if errors:
        raise errors[0]
    return results


def part(rank, count, dtype):
    return torch.randn(count, generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_sums_are_of_all_ranks_rounded_once_and_the_same_on_each(size, dtype):
    counts = (1, 7, 64 * 768, SLOT_BYTES // dtype.itemsize, SLOT_BYTES // dtype.itemsize + 1, 2_000_003)

    def work(exchange, rank):
        tensors = [part(rank, count, dtype).view(1, -1) for count in counts]
        assert all(exchange.all_reduce(tensor) for tensor in tensors)
        return tensors

    found = run(size, work)
    for index, count in enumerate(counts):
        exact = torch.stack([part(rank, count, dtype).double() for rank in range(size)]).sum(0)
        unit = torch.finfo(dtype).eps
        assert ((found[0][index][0].double() - exact).abs() <= unit * exact.abs() + size * 1e-6).all()
        assert all(torch.equal(of_rank[index], found[0][index]) for of_rank in found)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool, torch.bfloat16])
def test_gathered_is_what_each_rank_gave(dtype):
    counts = (0, 1, 333, SLOT_BYTES // dtype.itemsize + 5)

    def work(exchange, rank):
        made = []
        for count in counts:
            mine = (part(rank, count, torch.float32) * 9).to(dtype)
            made.append(torch.empty(3, count, dtype=dtype))
            exchange.all_gather(mine, made[-1])
        return made

    for of_rank in run(3, work):
        for count, gathered in zip(counts, of_rank, strict=True):
            assert torch.equal(gathered, torch.stack([(part(r, count, torch.float32) * 9).to(dtype) for r in range(3)]))


def test_ranks_of_any_speed_keep_in_step():
    """Each is slow at other times, and what was sent is changed at once."""

    def work(exchange, rank):
        random = torch.Generator().manual_seed(rank)
        for step in range(400):
            if torch.rand((), generator=random) < 0.05:
                threading.Event().wait(0.002)
            tensor = torch.full((100,), float(rank + step))
            exchange.all_reduce(tensor)
            assert tensor.tolist() == [sum(other + step for other in range(4))] * 100
            tensor.fill_(-1)

    run(4, work)


def test_what_is_not_summed_here_is_left_as_it_is():
    exchange = HostExchange(mmap.mmap(-1, size_in_bytes(1)), 0, 1, lambda waited_s: None)
    for tensor in (torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.int64), torch.ones(2, 3).T):
        before = tensor.clone()
        assert not exchange.all_reduce(tensor) and torch.equal(tensor, before)


def test_who_waits_is_asked_now_and_then(monkeypatch):
    monkeypatch.setattr(host_exchange, "_ASK_EVERY_S", 0.01)
    waits = []

    class Lost(Exception):
        pass

    def while_waiting(waited_s):
        waits.append(waited_s)
        if len(waits) == 5:
            raise Lost

    exchange = HostExchange(mmap.mmap(-1, size_in_bytes(2)), 0, 2, while_waiting)
    with pytest.raises(Lost):
        exchange.all_reduce(torch.ones(3))
    assert all(after - before >= 0.01 for before, after in itertools.pairwise([0, *waits]))


class Store(dict):
    """As much of the group's store as joining takes."""

    def set(self, key, value):
        self[key] = value.encode()

    def get(self, key):
        return self[key]


def test_who_came_while_it_was_asked_about_is_not_lost(monkeypatch):
    monkeypatch.setattr(host_exchange, "_ASK_EVERY_S", 0.01)
    memory = mmap.mmap(-1, size_in_bytes(2))

    def comes_and_leaves(waited_s):
        HostExchange(memory, 1, 2, lambda waited_s: None).all_reduce(torch.ones(3))
        return RuntimeError("it has left")

    tensor = torch.ones(3)
    assert HostExchange(memory, 0, 2, comes_and_leaves).all_reduce(tensor) and tensor.tolist() == [2, 2, 2]


def test_who_comes_only_after_too_long_is_lost(monkeypatch):
    """A rank that was stopped, and awakened to end."""
    monkeypatch.setattr(host_exchange, "_ASK_EVERY_S", 0.01)
    memory = mmap.mmap(-1, size_in_bytes(2))

    def comes_late(waited_s):
        HostExchange(memory, 1, 2, lambda waited_s: None).all_reduce(torch.ones(3))
        raise RuntimeError("it was stopped")

    with pytest.raises(RuntimeError, match="it was stopped"):
        HostExchange(memory, 0, 2, comes_late).all_reduce(torch.ones(3))


def test_who_has_ended_without_coming_is_lost(monkeypatch):
    monkeypatch.setattr(host_exchange, "_ASK_EVERY_S", 0.01)
    exchange = HostExchange(mmap.mmap(-1, size_in_bytes(2)), 0, 2, lambda waited_s: RuntimeError("it is dead"))
    with pytest.raises(RuntimeError, match="it is dead"):
        exchange.all_reduce(torch.ones(3))


def test_a_pause_of_all_processes_is_no_wait(monkeypatch):
    seconds, waits = itertools.count(step=1000), []
    monkeypatch.setattr(host_exchange.time, "monotonic", lambda: float(next(seconds)))

    def while_waiting(waited_s):
        waits.append(waited_s)
        if len(waits) == 3:
            raise RuntimeError("long enough")

    with pytest.raises(RuntimeError, match="long enough"):
        HostExchange(mmap.mmap(-1, size_in_bytes(2)), 0, 2, while_waiting).all_reduce(torch.ones(3))
    assert waits == [1, 2, 3]


@pytest.mark.parametrize(
    "hindrance", [None, "the processor", "Python", "not allowed", "no room", "another process of that number"]
)
def test_where_it_cannot_be_had_no_rank_has_it(monkeypatch, hindrance):
    store = Store()
    monkeypatch.setattr(host_exchange.dist, "PrefixStore", lambda prefix, inner: inner)
    if hindrance == "the processor":
        monkeypatch.setattr(host_exchange.platform, "machine", lambda: "aarch64")
    if hindrance == "Python":
        monkeypatch.delattr(host_exchange.os, "memfd_create")
    if hindrance == "not allowed":

        def not_allowed(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(host_exchange.os, "memfd_create", not_allowed)
    if hindrance == "no room":

        def no_room(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(host_exchange.os, "posix_fallocate", no_room)
    if hindrance == "another process of that number":
        path_of, original = "memory", store.set

        def with_another_token(key, value):
            original(key, value[:-1] + ("0" if value[-1] != "0" else "1") if key == path_of else value)

        store.set = with_another_token
    joined = HostExchange.join(store, 0, 1, lambda waited_s: None)
    assert (joined is None) == (hindrance is not None)
    if joined is not None:
        tensor = torch.ones(3)
        assert joined.all_reduce(tensor) and tensor.tolist() == [1, 1, 1]
