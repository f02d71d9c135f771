import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked at through /proc")


def state(process: subprocess.Popen) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


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
