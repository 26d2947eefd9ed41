"""Memory: how far a run of a variant raises the peak, measured in a fresh process per variant.

On Linux the process resets its peak resident size (5 into /proc/self/clear_refs) right before the run and reads it
afterwards (VmHWM). It has run the variant once before, so memory that is allocated once for good (threads, compiled
code) is not counted. malloc is told to hand every block of 64 KiB or more back to the system; otherwise blocks left
over from the first run would hide the need of the second. On a GPU it is PyTorch's own peak. The method is tried on an
allocation of known size each time. The outputs of a run are counted apart: the extra memory is the growth less the
outputs, and can be a little below 0 where an output took memory that was there.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cmdp_fast.bench.case import Case, Shape
from cmdp_fast.bench.implementations import variants_of
from cmdp_fast.bench.results import KNOWN, PeakGrowth
from cmdp_fast.bench.variant import Absent, Inputs, Variant
from cmdp_fast.children import command

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RETURN_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}


def unavailable(device: str) -> str | None:
    """Why memory cannot be measured here, or None."""
    if device == "cuda" or CLEAR_REFS.exists():
        return None
    return f"this system has no {CLEAR_REFS}: the peak resident size cannot be reset"


def measure_memory(case: Case, variant: Variant) -> PeakGrowth:
    """The growth of the peak in a variant's run, in a process of its own. Raises Absent with the reason if it fails."""
    request = asdict(case) | {"variant": variant.name, "peer": variant.peer, "threads": torch.get_num_threads()}
    environment = os.environ | RETURN_BLOCKS | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    run = command("cmdp_fast.bench.memory", json.dumps(request))
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise Absent(f"the process that measures memory failed: {last[0]}")
    return PeakGrowth(**json.loads(done.stdout.splitlines()[-1]))


def growth(function: Callable[[], object], device: str) -> tuple[int, object]:
    """(the bytes by which a call raises the peak, the value that it returns)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    CLEAR_REFS.write_text("5")
    before = _peak()
    result = function()
    return _peak() - before, result


def peak_growth(variant: Variant, inputs: Inputs, device: str) -> PeakGrowth:
    """The growth of the peak in a run, its outputs apart, in this process, which has run the variant before."""
    known, _ = growth(lambda: torch.ones(KNOWN // 4, device=device), device)
    state = variant.state(inputs)
    grown, result = growth(lambda: variant.run(state), device)
    kept = {t.untyped_storage().data_ptr() for t in inputs.values()}
    outputs = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in variant.values(result).values()}
    if isinstance(state, dict):
        kept |= {t.untyped_storage().data_ptr() for t in state.values()}
    return PeakGrowth(growth=grown, outputs=sum(n for at, n in outputs.items() if at not in kept), known=known)


def _peak() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _child(request: dict[str, Any]) -> PeakGrowth:
    name, peer, threads = (request.pop(key) for key in ("variant", "peer", "threads"))
    torch.set_num_threads(threads)
    case = Case(**(request | {"shape": Shape(**request["shape"])}))
    op, variants, _ = variants_of(case, (peer,) if peer else ())
    variant = next(v for v in variants if v.name == name)
    inputs = op.make(case, 0)
    del variants
    variant.run(variant.state(inputs))
    return peak_growth(variant, inputs, case.device)


if __name__ == "__main__":
    print(json.dumps(asdict(_child(json.loads(sys.argv[1])))))
