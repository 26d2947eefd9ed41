"""What has to be run on a machine with a GPU, a command per phase; no network is needed.

    python benchmarks/gpu.py prove|logits|linear|train [--seconds N] [--out DIR] [--only TEXT] [--small]

prove    versions, the device's ceilings, both GPU backends against float64, then the tests marked triton and cuda
logits   every operation on logits, 64 to 8192 rows, beside the floors and other libraries; compute-sanitizer
linear   `linear_token_stats`: sizes of tiles, what is saved, the bare products, other libraries, memory; ncu
train    random models of the sizes of Qwen2.5-1.5B and 7B: steps of this package's trainer and of TRL's; a kill

A phase ends within ``--seconds`` (480). Its parts stand in the order of their importance, and one is not begun where
less time is left than it is expected to take. ``DIR/PHASE.json`` is whole after every part: a part that fails is
recorded with its error, one that needs what is not installed with the reason, and the phase goes on. The table comes
last. With ``--only TEXT`` the parts that have TEXT in their name are run (again), and the others stay as the file of an
earlier run on the same card has them. Exit code 0: no part failed; 1: some did, the table names them; 2: the arguments
cannot be used.

``--small`` runs every phase at toy sizes on a CPU, in Triton's interpreter and (with CMDP_FAST_CUDA_HOST=1) with the
CUDA kernels compiled for the host. It says nothing about speed: it shows that the script works.

With wheels only. The machine needs torch, triton, transformers, accelerate, numpy, pytest, pytest-xdist,
pytest-timeout, hypothesis, rich, matplotlib, tensorboard, regex. What it lacks travels as wheels in a folder, 4.2 MB,
made for its Python where there is a network: this package with the CUDA kernels of one architecture (1.2 MB, two
minutes of two processors with nvcc, g++, cmake, ninja and pybind11), and the packages of `WHEELS` below (3 MB, pure
Python), without which their parts are recorded as absent:

    CMDP_FAST_CUDA=1 CUDAARCHS=90-real python3.12 -m pip wheel --no-deps --no-build-isolation -w wheels .
    python3.12 -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels NAME==VERSION ...

On the machine, in the checkout that the wheel was made of (other kernels than the tests know would be tested):

    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target build/site wheels/*.whl
    export PYTHONPATH=$PWD/build/site
    python3 benchmarks/gpu.py prove --out results      # then logits, linear, train

On an H200 `prove` took 224 s and `linear` 240 s. In 265 s `logits` had done 24 of its 65 parts, and in 300 s `train`
three of five; --only runs others later. Join phases with `;`: exit code 1 says that some part failed, which the next
one does not depend on.

A checkout whose package is not installed is used as it is: Triton needs no more than gcc and Python.h, for its
launcher, and the native module and the CUDA kernels are there if `python setup.py build_ext --inplace` (with
CMDP_FAST_CUDA=1) has made them there.

Results: copy a card's four JSON files to `benchmarks/results/gpu-CARD/` (`gpu-h100`) and make the pages anew
(`python -m cmdp_fast.bench.page`, whose docstring has the commands). The README then says "measured on", by itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from phases.record import Record
from phases.supervise import supervise

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("prove", "logits", "linear", "train")
SECONDS = 480.0
# Beside this package's own wheel. Pure Python, but for none that is large.
WHEELS = (
    "tyro==1.0.17",
    "docstring-parser==0.18.0",
    "typeguard==4.6.1",
    "datasets==5.2.0",
    "dill==0.4.1",
    "multiprocess==0.70.19",
    "trl==1.16.0",
    "liger-kernel==0.8.5",
    "cut-cross-entropy==25.1.1",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a phase; returns the exit code."""
    options = parser().parse_args(arguments)
    if not 1 <= options.seconds <= 86400:
        print(f"gpu.py: error: --seconds must be between 1 and 86400, got {options.seconds:g}", file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{options.phase}.json"
    path.with_suffix(".log").unlink(missing_ok=True)  # to which every program of the phase adds its output
    said = shlex.join(["python", "benchmarks/gpu.py", options.phase, *(["--small"] if options.small else [])])
    if options.only and path.exists():
        try:
            Record.again(path, options.only, options.seconds)
        except ValueError as error:
            print(f"gpu.py: error: --only: {error}", file=sys.stderr)
            return 2
    else:
        Record.new(path, options.phase, said, options.small, options.seconds, options.only)
    command = [sys.executable, "-u", str(Path(__file__).with_name("phases") / "worker.py"), options.phase, str(path)]
    record = supervise(command, environment(options.small), path)
    print(f"\n{record.table()}", flush=True)
    return 1 if record.failures else 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=__doc__.splitlines()[0], epilog="its docstring says more", allow_abbrev=False
    )
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="by when the phase has ended (default: 480)")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for JSON and logs")
    parser.add_argument("--only", default="", help="run only the parts with this in their name, beside what is there")
    parser.add_argument("--small", action="store_true", help="toy sizes on a CPU: only to try the script")
    return parser


def environment(small: bool) -> dict[str, str]:
    """Of the processes that do the work: no network, and the package where it is installed, else this checkout's."""
    given = dict(os.environ)
    given |= {name: "1" for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "CI")}
    given |= {"TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled", "HF_HUB_DISABLE_TELEMETRY": "1"}
    given["PYTHONFAULTHANDLER"] = "1"
    given["PYTHONSAFEPATH"] = "1"  # `python -m` would find the checkout in the working directory, without its modules
    paths = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "support"), *filter(None, [given.get("PYTHONPATH")])]
    if importlib.util.find_spec("cmdp_fast") is None:
        paths.append(str(ROOT))
    given["PYTHONPATH"] = os.pathsep.join(paths)
    if small:
        given |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    else:
        given.pop("TRITON_INTERPRET", None)
        given.pop("CMDP_FAST_CUDA_HOST", None)
    return given


if __name__ == "__main__":
    sys.exit(main())
