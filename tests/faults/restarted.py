"""A rank's program that one of them kills when it runs for the first time; what the others do then has to fail."""

import os
import signal

import torch

from engine.distributed import init_group

group = init_group("cpu", timeout_s=20)
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
group.all_reduce(torch.ones(3))
if attempt == 0 and group.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
total = group.all_reduce(torch.full((3,), float(group.rank + 1)))
if group.rank == 0:
    print(f"attempt {attempt}: {total.tolist()}, memory shared: {group._host is not None}")
group.close()
