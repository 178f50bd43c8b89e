"""TVM's parallel loops on the OpenMP pool that torch already runs.

Two pools of spinning threads halve each other's speed. The launcher is LLVM IR that TVM's own JIT loads, so no C compiler is needed;
`torch.set_num_threads` then rules both. Kernels loaded after `install` use it.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

from sparsecc.codegen.tvm.native import LAUNCHER, mapped, openmp


@lru_cache(maxsize=1)
def install() -> Any:
    """Replace TVM's launcher for this process; returns the module to keep alive, or None where torch runs no libgomp (TVM's own
    pool then serves, set to torch's number of threads)."""
    import torch
    import tvm

    ffi = mapped("libtvm_ffi")
    if not openmp() or ffi is None:  # the JIT resolves GOMP_parallel in torch's OpenMP
        threads = tvm.get_global_func("runtime.config_threadpool", allow_missing=True)
        if threads is not None:
            threads(1, torch.get_num_threads())
        return None
    module = tvm.runtime.load_module(str(LAUNCHER))
    register = ctypes.CDLL(ffi).TVMFFIEnvModRegisterContextSymbol
    if register(b"__TVMBackendParallelLaunch", ctypes.c_void_p(module["launch_addr"]())):
        raise RuntimeError("TVM refused the OpenMP launcher")
    return module
