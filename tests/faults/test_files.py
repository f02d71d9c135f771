"""Several processes that write one file at the same time."""

import os
import random

from engine.files import write_whole

NUM_WRITERS, NUM_WRITES = 4, 60


def test_it_is_whole_at_all_times_and_nobody_fails(tmp_path):
    path = tmp_path / "x"
    children = []
    for writer in range(NUM_WRITERS):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                sizes = random.Random(writer)
                for _ in range(NUM_WRITES):
                    write_whole(path, bytes([writer]) * sizes.randrange(1, 20_000))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    ended = {}
    while len(ended) < NUM_WRITERS:
        if path.exists():
            assert len(set(path.read_bytes())) == 1
        for child in set(children) - ended.keys():
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                ended[pid] = status
    assert set(ended.values()) == {0}
    assert list(tmp_path.iterdir()) == [path]
