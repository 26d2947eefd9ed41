"""CMDP_FAST_CUDA_HOST=1: the CUDA kernels, compiled for the host, are what `cmdp_fast._cuda` imports in this process.

CPU tensors then go through the `cuda` backend's own Python code and the kernels' own source (tests/csrc/cuda_host). A
program imports this module before `cmdp_fast`.
"""

import ctypes
import importlib.util
import os
import sys

import host_build
import pytest

HOSTED = os.environ.get("CMDP_FAST_CUDA_HOST") == "1"
_library = None

if HOSTED:
    if host_build.problem() is not None:
        pytest.exit(f"CMDP_FAST_CUDA_HOST=1, but {host_build.problem()}", returncode=2)
    _path = host_build.extension()
    _spec = importlib.util.spec_from_file_location("cmdp_fast._cuda", _path)
    sys.modules["cmdp_fast._cuda"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["cmdp_fast._cuda"])
    _library = ctypes.CDLL(str(_path))
    _library.cuda_host_seed.argtypes = (ctypes.c_uint64,)
    _library.cuda_host_launches.restype = ctypes.c_uint64
    _library.cuda_host_seed(1)  # from here on every launch draws another order


def seed(value: int) -> None:
    """From where orders are drawn; 0: none is, blocks and threads run one after another. Nothing on a GPU."""
    if _library is not None:
        _library.cuda_host_seed(value)


def launches() -> int:
    """How many kernels have been launched, on the host."""
    return _library.cuda_host_launches()
