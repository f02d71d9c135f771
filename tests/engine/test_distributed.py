import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import gloo_rank
import pytest
import torch
from ranks import World, run_ranks

from engine.distributed import TPGroup, choose_device, init_group, launched_rank
from engine.errors import InputError

# --- real processes ---

GROUPS = [(4, "memory"), (2, "memory"), (2, "gloo")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank of the groups, one after another, generated, by (size, way, rank)."""
    folder = tmp_path_factory.mktemp("ranks")
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in GROUPS]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        groups = [f"{size}:{s.getsockname()[1]}:{way}" for (size, way), s in zip(GROUPS, sockets, strict=True)]
    root = Path(gloo_rank.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, gloo_rank.__file__, str(folder), *groups]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(4)
    ]
    try:
        for rank, process in enumerate(processes):
            _, errors = process.communicate(timeout=150)
            assert process.returncode == 0, f"rank {rank}: {errors}"
    finally:
        for process in processes:
            process.kill()
    return {
        (size, way, rank): torch.load(folder / f"{size}-{way}-{rank}.pt")
        for size, way in GROUPS
        for rank in range(size)
    }


def test_processes_generate_what_one_generates(results):
    alone = gloo_rank.generate(gloo_rank.make_engine(TPGroup()))
    assert {reason for case in alone.values() for _, reason, _, _ in case} == {"stop", "length"}
    for (size, *_), made in results.items():
        assert made["size"] == size and made["cases"].keys() == alone.keys()
        for name, case in alone.items():
            for (tokens, reason, logprobs, logits), mine in zip(case, made["cases"][name], strict=True):
                assert (tokens, reason) == mine[:2], name
                assert (logprobs is None) == (mine[2] is None)
                assert logprobs is None or logprobs == pytest.approx(mine[2], abs=2e-5)
                assert (logits - mine[3]).abs().max() <= 1e-5 * logits.abs().max(), name


def test_every_process_returns_the_same_bits_and_has_the_same_room(results):
    for (size, way, rank), made in results.items():
        first = results[size, way, 0]
        assert made["max_tokens"] == first["max_tokens"] > 0
        for name, case in first["cases"].items():
            for (*outcome, logits), (*mine, my_logits) in zip(case, made["cases"][name], strict=True):
                assert outcome == mine and torch.equal(logits, my_logits), (name, rank)


# --- one process ---


def test_a_group_of_one_needs_no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    group = init_group("cpu")
    assert (group.rank, group.size, group.device) == (0, 1, torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    gloo_rank.check_collectives(group)
    group.close()


def test_cpu_is_the_device_where_there_is_no_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device(None, 3) == choose_device("cpu", 3) == torch.device("cpu")
    with pytest.raises(InputError, match="PyTorch sees no CUDA device; use --device cpu"):
        choose_device("cuda")


def test_ranks_take_the_devices_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device(name, 3).index for name in (None, "cuda", "cuda:0")] == [1, 1, 0]
    with pytest.raises(InputError, match="'cuda:2' was asked for, but there are 2: cuda:0 to cuda:1"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x"])
def test_devices_that_are_not_known(name):
    with pytest.raises(InputError, match=f"device '{name}' is not .*accepted: cpu, cuda, cuda:N"):
        choose_device(name)


# --- the ranks of other tests, which are threads ---


@pytest.mark.parametrize("size", [1, 2, 4])
def test_threads_do_what_processes_do(size):
    run_ranks(size, gloo_rank.check_collectives)


def test_models_on_threads_run_in_inference_mode():
    """Which every thread has to enter itself."""
    run = lambda group: gloo_rank.make_engine(group).model.logits(torch.ones(1, 64)).is_inference()  # noqa: E731
    assert run_ranks(2, run) == [True, True]


def test_tensors_that_change_after_a_collective_do_not_change_its_result():
    def work(group):
        mine = torch.full((64,), float(group.rank))
        for step in range(300):
            gathered = group.all_gather(mine)
            mine += 1
            assert gathered[:, 0].tolist() == [rank + step for rank in range(group.size)]

    run_ranks(4, work)


def test_a_world_serves_again_after_an_error():
    world = World(3)

    def fail(group):
        group.barrier()
        if group.rank == 1:
            raise ValueError("on rank 1")
        group.all_reduce(torch.ones(1))

    for _ in range(2):
        with pytest.raises(ValueError, match="on rank 1"):
            world.run(fail)
        assert world.run(lambda group: group.all_reduce(torch.ones(1)).item()) == [3.0] * 3


def test_ranks_that_do_different_things_are_told():
    def work(group):
        if group.rank == 0:
            group.all_reduce(torch.ones(2))
        else:
            group.all_gather(torch.ones(2))

    with pytest.raises(AssertionError, match="ranks do different things"):
        run_ranks(2, work)


# --- what rank 0 does for all ---


def test_rank_0_acts_and_all_have_the_result():
    ran = []
    assert run_ranks(3, lambda group: group.on_rank_0(lambda: ran.append(group.rank) or "result")) == ["result"] * 3
    assert ran == [0]
    assert TPGroup().on_rank_0(lambda: "alone") == "alone"


@pytest.mark.parametrize("error", [InputError("give another"), PermissionError(13, "Permission denied", "out")])
def test_its_mistake_is_raised_on_all(error):
    def act():
        raise error

    def caught(group) -> str:
        with pytest.raises(type(error)) as raised:
            group.on_rank_0(act)
        group.barrier()  # none has given up early
        return str(raised.value)

    assert run_ranks(3, caught) == [str(error)] * 3


def test_the_launchers_rank_is_known_before_the_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launched_rank() == 0
    monkeypatch.setenv("RANK", "5")
    assert launched_rank() == 5
