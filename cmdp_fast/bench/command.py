"""`cmdp-fast bench`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from cmdp_fast.bench import compare, floors, machine, plots, results
from cmdp_fast.bench.case import DTYPES, SHAPES
from cmdp_fast.bench.ops import OPS
from cmdp_fast.bench.peers import PEERS
from cmdp_fast.bench.show import Screen, header
from cmdp_fast.bench.suite import Plan, run_case
from cmdp_fast.bench.sweep import AXES, sweeps
from cmdp_fast.errors import InputError, readable
from cmdp_fast.files import check_replaceable, check_writable
from cmdp_fast.masking import public_words
from cmdp_fast.nearest import did_you_mean
from cmdp_fast.terminal import beside, columns, show, wrapped
from cmdp_fast.trainer.interrupts import Interrupts

DEVICES = ("cpu", "cuda")
MOST = {"repeat": 10**6, "threads": max(1024, os.cpu_count() or 1)}  # OpenMP ends a process that cannot start a thread


class _Parser(argparse.ArgumentParser):
    """Its errors are InputErrors, and its help has whole words."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError: argparse would print, and exit."""
        raise InputError(message.removeprefix("argument "))

    def print_help(self, file: object = None) -> None:
        """Raises ConsoleLost where it cannot be printed: argparse would say nothing, and exit as if it were."""
        show(self.format_help().rstrip("\n"), sys.stdout)

    def format_help(self) -> str:
        """The options, within the width of the terminal."""
        width = columns(sys.stdout)
        lines = wrapped("usage: cmdp-fast bench [OP ...] [options]", width)
        lines += ["", *wrapped(self.description or "", width), ""]
        for action in self._actions:
            given = "" if action.nargs == 0 or not action.option_strings else f" {action.metavar}"
            flag = f"{', '.join(action.option_strings) or 'OP ...'}{given}"
            lines += beside(flag, action.help or "", width, 26)
        return "\n".join([*lines, "", *wrapped(self.epilog or "", width), ""])


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = _Parser(
        prog="cmdp-fast bench",
        description="Speed, memory and error of the operations beside other libraries' and the machine's floors.",
        epilog=f"Operations: {', '.join(OPS)}. Shapes: {', '.join(SHAPES)}. Peers: {', '.join(PEERS)}.",
        allow_abbrev=False,
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="operations (default: all)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda (default: cpu)")
    parser.add_argument("--shapes", metavar="NAMES", help="comma-separated (default: each operation's own)")
    parser.add_argument(
        "--dtype",
        default="float32,bfloat16",
        metavar="NAMES",
        help="some of float32, bfloat16, float16, comma-separated (default: float32,bfloat16)",
    )
    parser.add_argument(
        "--peers",
        default=",".join(PEERS),
        metavar="NAMES",
        help="peers to measure beside ours, comma-separated, or none (default: all)",
    )
    parser.add_argument(
        "--repeat", type=int, default=9, metavar="ROUNDS", help="times that all is measured (default: 9 rounds)"
    )
    parser.add_argument("--threads", type=int, metavar="THREADS", help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--no-memory", action="store_true", help="leave out memory, which takes a process per variant")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here (default: nowhere)")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="print what has changed since that run (default: nothing)"
    )
    parser.add_argument(
        "--sweep", metavar="AXIS", help=f"instead of cases, scaling along one of {', '.join(AXES)} (default: cases)"
    )
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw PNG files here (default: nowhere)")
    return parser


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """The options on a command line. Raises InputError for those that do not exist."""
    options, unknown = parser().parse_known_args(arguments)
    if unknown:
        known = [name for action in parser()._actions for name in action.option_strings]
        raise InputError(f"{unknown[0]}: there is no such option{did_you_mean(unknown[0].partition('=')[0], known)}")
    return options


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises InputError for arguments that cannot be used, before any work is done.

    Ctrl-C and SIGTERM end it after the round at hand, a second one at once: KeyboardInterrupt is raised, and what was
    measured is in the file, marked as incomplete.
    """
    options = options_of(arguments)
    plan = plan_of(options)
    old = results.read(options.compare) if options.compare else None
    if options.json is not None:
        check_replaceable(options.json, f"--json {readable(str(options.json))}")
    if options.plots is not None:
        if not options.plots.parent.is_dir():
            raise InputError(f"--plots {options.plots}: there is no folder {options.plots.parent}")
        check_writable(options.plots, f"--plots {readable(str(options.plots))}")
    files = [path for path in (options.json, options.plots) if path is not None]
    if not files and sys.stdout is None:
        raise InputError("the standard output is closed, and --json names no file: what is measured would be lost")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    run = results.BenchmarkRun(
        command=shlex.join(public_words(["cmdp-fast", "bench", *arguments])),
        machine=machine.describe(plan.device),
        settings={"repeat": plan.repeat, "threads": torch.get_num_threads()},
        limits=floors.device_limits(plan.repeat) if plan.device == "cuda" else {},
    )
    screen = Screen(f"what was measured is in {', '.join(map(str, files))}" if files else "")
    screen.lines(header(run))
    with Interrupts() as interrupts:
        interrupts.deferred, interrupts.waits = True, "finishing the round at hand"
        plan = replace(plan, stopped=lambda: interrupts.received)
        try:
            for _ in _sweep(plan, options.sweep, run, screen) if options.sweep else _cases(plan, run, screen):
                run.incomplete = interrupts.received
                if options.json:  # after every case, so that a run that is killed leaves its cases so far
                    run.write(options.json)
                if interrupts.received:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            _interrupted(run, options.json, screen)
            raise
    if old is not None:
        short = ", which was interrupted and is incomplete" if old.incomplete else ""
        screen.table(f"changes since {options.compare}{short}", compare.changes(old, run))
    if options.plots:
        screen.lines([f"wrote {path}" for path in plots.draw([run], options.plots)])
    screen.check()


def _interrupted(run: results.BenchmarkRun, path: Path | None, screen: Screen) -> None:
    """Marks what was measured as incomplete, and says where it is."""
    run.incomplete = True
    measured = len(run.cases) + len(run.sweeps)
    if path and measured:  # else an older file stays
        run.write(path)
    where = f"{path} has them, marked as incomplete" if path and measured else "nothing was written"
    screen.lines([f"interrupted: {measured} cases measured, {where}"])


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan that the options describe. Raises InputError for unknown names and impossible numbers."""
    ops = tuple(dict.fromkeys(options.ops)) or tuple(OPS)
    _among("operation", ops, OPS)
    shapes = _names("--shapes", options.shapes, SHAPES) if options.shapes is not None else ()
    dtypes = _names("--dtype", options.dtype, DTYPES)
    peers = () if options.peers == "none" else _names("--peers", options.peers, PEERS)
    _among("--device", (options.device,), DEVICES)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU here")
    for name, most in MOST.items():
        value = getattr(options, name)
        if value is not None and not 1 <= value <= most:
            bound = "at least 1" if value < 1 else f"at most {most}"
            raise InputError(f"--{name} must be {bound}, got {value}")
    if options.sweep is not None:
        _among("--sweep", (options.sweep,), AXES)
        if not any(options.sweep in OPS[op].axes for op in ops):
            raise InputError(f"--sweep {options.sweep}: none of {', '.join(ops)} is swept along it")
    return Plan(ops, shapes, dtypes, peers, options.device, options.repeat, memory=not options.no_memory)


def _names(option: str, given: str, known: Collection[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if not names:
        raise InputError(f"{option} is empty; expected some of {', '.join(known)}")
    _among(option, names, known)
    return names


def _among(option: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"{option} {name!r} is unknown; expected {', '.join(known)}{did_you_mean(name, known)}")


def _cases(plan: Plan, run: results.BenchmarkRun, screen: Screen) -> Iterator[None]:
    for case in plan.cases():
        if reason := OPS[case.op].why_not(case):
            run.left_out[case.label] = reason
            continue
        run.cases.append(run_case(case, plan, screen.say))
        screen.case(run.cases[-1])
        yield
    if run.left_out:
        screen.lines(["", *(f"left out: {label}: {reason}" for label, reason in run.left_out.items())])
    if not run.cases:
        raise InputError("nothing is left to be measured, see above")


def _sweep(plan: Plan, axis: str, run: results.BenchmarkRun, screen: Screen) -> Iterator[None]:
    for sweep in sweeps(plan, axis, screen.say):
        run.sweeps.append(sweep)
        screen.sweep(sweep)
        yield
