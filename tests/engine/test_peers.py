import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore, PrefixStore

from engine.peers import Peers, _Process, _status

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked at through /proc")


def state(process: subprocess.Popen) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)  # Python acts on it between two of its own steps


def test_of_the_launchers_processes_those_of_the_group_are_awakened():
    group = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    of_another = group | {"MASTER_PORT": "2", "RANK": "3"}
    environments = {"rank": group | {"RANK": "3"}, "of another group": of_another, "no rank": dict(os.environ)}
    processes = {name: subprocess.Popen(["sleep", "60"], env=env) for name, env in environments.items()}
    try:
        for process in processes.values():
            process.send_signal(signal.SIGSTOP)
        while any(state(process) != "T" for process in processes.values()):
            time.sleep(0.01)
        program = "from engine.peers import awaken_siblings; print(awaken_siblings())"
        done = subprocess.run([sys.executable, "-c", program], env=group, capture_output=True, text=True, check=True)
        assert done.stdout == f"['rank 3 (process {processes['rank'].pid})']\n"
        assert {name: state(process) == "T" for name, process in processes.items()} == {
            "rank": False,
            "of another group": True,
            "no rank": True,
        }
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


class TestSigterm:
    """This process is rank 0, and ``sleep`` is rank 1."""

    @pytest.fixture(autouse=True)
    def ended(self):
        """Grows when SIGTERM does what it did before the group was joined: end the process."""
        ended = []
        before = signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
        yield ended
        signal.signal(signal.SIGTERM, before)

    @pytest.fixture
    def other(self):
        process = subprocess.Popen(["sleep", "60"])
        yield process
        process.kill()
        process.wait()

    @pytest.fixture
    def store(self, other):
        store, (_, _, started) = PrefixStore("peers", HashStore()), _status(other.pid)
        store.set("process 1", f"{_Process.own().place}/{other.pid}/{started}")
        return store

    @pytest.fixture
    def peers(self, store):
        peers = Peers(store.underlying_store, rank=0, size=2, timeout_s=10)
        peers.take_sigterm()
        return peers

    @pytest.mark.parametrize("leaves_first", [False, True])
    def test_a_rank_that_is_to_tell_of_a_lost_one_is_not_ended_before_it_has(self, peers, other, ended, leaves_first):
        other.kill()
        error = peers.explain(RuntimeError("the connection was closed"))
        assert f"rank 1 (process {other.pid}) is dead" in str(error) and not error.told_elsewhere
        if leaves_first:
            peers.leave()
        terminate()  # as the launcher does
        assert not ended
        peers.leave()
        terminate()  # by somebody else
        assert ended

    def test_it_can_be_ended_later(self, peers, other, ended, monkeypatch):
        """A program that goes on after the error."""
        monkeypatch.setattr("engine.peers._LAUNCHER_S", 0.05)
        other.kill()
        peers.explain(RuntimeError("the connection was closed"))
        peers.leave()
        time.sleep(0.1)
        terminate()
        assert ended

    def test_another_thread_can_explain_and_leave(self, peers, other):
        other.kill()
        with ThreadPoolExecutor(1) as pool:
            error = pool.submit(peers.explain, RuntimeError("the connection was closed")).result()
            pool.submit(peers.leave).result()
        assert "is dead" in str(error)

    def test_a_rank_that_leaves_the_telling_to_another_can_be_ended(self, peers, store, ended):
        store.set("left 1", "")
        assert peers.explain(RuntimeError("the connection was closed")).told_elsewhere
        peers.leave()
        terminate()
        assert ended

    def test_cleaning_up_after_it_is_not_disturbed_by_a_second(self, peers, ended):
        with pytest.raises(SystemExit):
            terminate()
        terminate()
        assert not ended

    def test_it_is_as_it_was_once_the_group_is_left(self, peers, ended):
        peers.leave()
        terminate()
        assert ended
