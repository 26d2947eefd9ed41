"""The command line: `cmdp-fast train`, `compare`, `evaluate`, `report`, `teacher`, `cache-teacher`, `bench`, `info`."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Sequence

COMMANDS = """\
usage: cmdp-fast COMMAND [options]

commands:
  train          distil a student from a teacher under a KL budget
  compare        run several methods on one task with several seeds: a table and plots
  evaluate       measure a student on held-out problems, with or without a teacher
  report         put what trainings have written on a page: samples side by side, measures, a plot
  teacher        serve a teacher's hidden states to trainers elsewhere
  cache-teacher  store what a teacher says of completions, to train on them without it
  bench          speed, memory and error beside other libraries (needs the extra `bench`)
  info           versions, CPU features, kernel variant, threads and backends

All but bench and info need the extra `train`: pip install '.[train]' in the checkout.
`cmdp-fast COMMAND --help` lists a command's options.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code.

    0, 1 for a comparison of which a run failed, 2 for an input that the user has to change, 130 for an interrupt.
    """
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if command in ("-h", "--help"):
        print(COMMANDS, end="")
        return 0
    if command == "info":
        from .info import report

        print(report())
        return 0
    if command in ("train", "compare", "evaluate", "report", "teacher", "cache-teacher"):
        return _with_the_extra(command, rest)
    if command == "bench":
        return _bench(rest)
    print(
        f"cmdp-fast: error: unknown command {command!r}\n{COMMANDS}" if command else COMMANDS, end="", file=sys.stderr
    )
    return 2


def _with_the_extra(command: str, arguments: Sequence[str]) -> int:
    try:
        from .errors import InputError, ProcessAlone, ProcessLost
        from .trainer.records.report import quiet_libraries

        if command != "report":  # which reads files alone, and imports none of them
            quiet_libraries()
        run = _runner(command)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("cmdp_fast"):
            raise
        from .installation import extra

        print(
            f"cmdp-fast: error: {command} needs {error.name}, which comes with the extra: {extra('train')}",
            file=sys.stderr,
        )
        return 2

    try:
        return run(arguments)
    except InputError as error:
        if os.environ.get("CMDP_FAST_TRACEBACK") == "1":
            _tell_all("".join(traceback.format_exception(error)))  # of several processes one has the cause
        each_machine = isinstance(error, ProcessLost) or not _have_met()
        _say(f"error: {error}", each_machine, alone=isinstance(error, ProcessAlone))
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130


def _say(message: str, each_machine: bool = False, alone: bool = False) -> None:
    """Of several processes the first one speaks, of all or of `each_machine`: the others have the same to say
    (trainer/distributed.py), unless they have not met yet, or the one that speaks is lost. One that is `alone` with
    what it has to say speaks too."""
    if alone or os.environ.get("LOCAL_RANK" if each_machine else "RANK", "0") == "0":
        _tell_all(f"cmdp-fast: {message}")


def _have_met() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _tell_all(message: str) -> None:
    from cmdp_fast.errors import without_controls

    print(without_controls(message), file=sys.stderr)


def _runner(command: str) -> Callable[[Sequence[str]], int]:
    """The function that runs a command with its arguments and returns the exit code."""
    if command == "compare":
        from .trainer.comparison.compare import compare
        from .trainer.comparison.plan import parse_compare

        return lambda arguments: 0 if compare(parse_compare(arguments), arguments) else 1
    if command == "evaluate":
        from .trainer.evaluate_student import evaluate_student, parse_evaluate

        return lambda arguments: _done(evaluate_student(parse_evaluate(arguments)))
    if command == "report":
        from .trainer.run_report.command import parse_report, write_report

        return lambda arguments: _done(write_report(parse_report(arguments)))
    if command == "teacher":
        from .trainer.serve_teacher import parse_teacher, serve_teacher

        def serve(arguments: Sequence[str]) -> int:
            serve_teacher(parse_teacher(arguments), arguments)
            return 0

        return serve
    if command == "cache-teacher":
        from .trainer.cache_teacher import cache_teacher, parse_cache

        return lambda arguments: _done(cache_teacher(parse_cache(arguments)))
    from .trainer.dry_run import dry_run
    from .trainer.parse import parse
    from .trainer.run import train

    def run(arguments: Sequence[str]) -> int:
        config = parse(arguments)
        return _done(dry_run(config) if config.dry_run else train(config))

    return run


def _done(_: object) -> int:
    return 0


def _bench(arguments: Sequence[str]) -> int:
    for needed in ("rich", "matplotlib"):
        if importlib.util.find_spec(needed) is None:
            from .installation import extra

            print(
                f"cmdp-fast: error: bench needs {needed}, which comes with the extra: {extra('bench')}",
                file=sys.stderr,
            )
            return 2
    from .bench.command import entry

    return entry(arguments)


if __name__ == "__main__":
    sys.exit(main())
