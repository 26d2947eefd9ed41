"""The process that runs the parts of a phase: `python worker.py PHASE RECORD.json`; `supervise.py` starts it."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from phases.record import Record, run_parts
from phases.supervise import LOST

if os.environ.get("CMDP_FAST_CUDA_HOST") == "1":
    import hosted  # noqa: F401  (before cmdp_fast: it brings the CUDA kernels)
if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.look_once_a_launch()
    interpreter.look_types_up_once()
    interpreter.round_once()


def main(phase: str, path: Path) -> int:
    """Runs the parts that the record has not, and returns the exit code."""
    import torch

    from phases.setting import Setting

    record = Record.read(path)
    small = record.content["small"]
    if not small and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU here; --small tries the script on a CPU")
    setting = Setting(small, "cpu" if small else "cuda", path.with_suffix(".log"), lambda: record.left)
    here = setting.machine()
    if record.content["machine"] is None:
        record.content["machine"] = here
        record.write()
    elif _card(record.content["machine"]) != _card(here):
        raise SystemExit(f"{path} is of {_card(record.content['machine'])}, not of {_card(here)}: choose another --out")
    only = record.content.get("only", "")
    parts = [part for part in importlib.import_module(f"phases.{phase}").parts(setting) if only in part.name]
    return 0 if run_parts(record, parts, setting.alive) else LOST


def _card(machine: dict[str, Any]) -> str:
    return (machine.get("gpu") or {}).get("name", "no GPU")


if __name__ == "__main__":
    here = str(Path(__file__).parent)  # its modules are those of the package `phases`, and nothing else's
    sys.path[:] = [path for path in sys.path if path != here]
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
