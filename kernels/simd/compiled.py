"""Machine code from vector code, and its launch on the threads of PyTorch."""

import ctypes
import struct

import numpy as np
import torch

from kernels.simd.target import Target, fork_join, llvm

# Before the caller's arguments go the counters that hand out tasks and numbers of threads, how many tasks there are,
# and how many are handed out at once.
NUM_HIDDEN = 3
# Enough that threads end together, and few enough that they do not wait for each other at the counter.
_CLAIMS_PER_THREAD = 16


class CompiledKernel:
    """Machine code, kept as long as this object, of the function ``name`` in LLVM's assembly language."""

    def __init__(self, name: str, target: Target, assembly: str):
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=target.cpu, features=target.features, opt=3, jit=True
        )
        module = llvm.parse_assembly(assembly)
        tuning = llvm.PipelineTuningOptions(3)
        # The kernels say themselves what is vectorised and unrolled.
        tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = False
        passes = llvm.create_pass_builder(machine, tuning)
        passes.getModulePassManager().run(module, passes)
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        self._address = self._engine.get_function_address(name)

    def launch(self, num_tasks: int, *arguments: torch.Tensor | np.ndarray | int | float) -> None:
        """Runs the tasks on as many threads as PyTorch uses. Arrays and tensors are passed by address."""
        num_threads = min(torch.get_num_threads(), num_tasks)
        if num_threads == 0:
            return
        counters = (ctypes.c_int64 * 2)()
        at_once = max(1, num_tasks // (_CLAIMS_PER_THREAD * num_threads))
        packed = (ctypes.c_int64 * (NUM_HIDDEN + len(arguments)))(
            ctypes.addressof(counters), num_tasks, at_once, *[x if type(x) is int else _pack(x) for x in arguments]
        )
        fork_join()(self._address, packed, num_threads, 0)


def _pack(argument: torch.Tensor | np.ndarray | float) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return struct.unpack("q", struct.pack("d", argument))[0]
    return argument.ctypes.data
