"""The command line: `cmdp-fast train`, `compare`, `evaluate`, `report`, `teacher`, `cache-teacher`, `bench`, `doctor`,
`info`."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from cmdp_fast import __version__, starting
from cmdp_fast.errors import InputError, Interrupted, ProcessAlone, ProcessLost, first_line, readable, root_cause
from cmdp_fast.installation import extra
from cmdp_fast.masking import told
from cmdp_fast.nearest import did_you_mean
from cmdp_fast.terminal import ConsoleLost, beside, columns, flush, message, show, wrapped
from cmdp_fast.time_limits import Overdue, end_in_time

COMMANDS = {
    "train": "distil a student from a teacher under a KL budget",
    "compare": "run several methods on one task with several seeds: a table and plots",
    "evaluate": "measure a student on held-out problems, with or without a teacher",
    "report": "put what trainings have written on a page: samples side by side, measures, a plot",
    "teacher": "serve a teacher's hidden states to trainers elsewhere",
    "cache-teacher": "store what a teacher says of completions, to train on them without it",
    "bench": "speed, memory and error beside other libraries (needs the extra `bench`)",
    "doctor": "check this installation and its kernels; its output is what a bug report should hold",
    "info": "versions, CPU features, kernel variant, threads and backends",
}
WITH_THE_EXTRA = ("train", "compare", "evaluate", "report", "teacher", "cache-teacher")
NO_OPTIONS = ("doctor", "info")
UNWRITABLE, INTERRUPTED, UNREAD = 74, 130, 141  # exit codes: EX_IOERR, and those of programs that signals end

EXIT_CODES = (
    "Exit codes: 1 a run of compare has failed, or doctor has found a problem; 2 something has to be given otherwise; "
    "74 the output cannot be written; 130 an interrupt; 141 nobody reads the output any more."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code.

    0, 1 for a comparison of which a run failed and where `doctor` finds a problem, 2 for an input that the user has to
    change, 74 where the output cannot be written (a full disk, a standard output that is closed), 130 for an interrupt,
    141 where nobody reads the output any more (``| head -1``). A training, which leaves files, goes on without its
    output. So does what writes figures to a file as well; in the end it says on stderr where they are.
    """
    starting.over()
    code = 1  # of an error that is ours
    try:
        try:
            code = _main(list(sys.argv[1:] if arguments is None else arguments) or [""])
            flush(sys.stdout)
        except ConsoleLost as lost:
            code = UNREAD if lost.unread else UNWRITABLE
            if str(lost):
                _say(f"error: {lost}")
    finally:
        if arguments is None and (end_in_time(code) or code == INTERRUPTED):
            # What still runs in threads is waited for, unless there is another Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


def _main(words: Sequence[str]) -> int:
    command, *rest = words
    if command in ("-h", "--help"):
        show(overview(columns(sys.stdout)), sys.stdout)
        return 0
    if command in ("-V", "--version"):
        show(f"cmdp-fast {__version__}", sys.stdout)
        return 0
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS) or " (cmdp-fast --help lists them)"
        _tell_all(f"cmdp-fast: error: unknown command {command!r}{hint}" if command else overview(columns(sys.stderr)))
        return 2
    try:
        if command in NO_OPTIONS:
            return _without_options(command, rest)
        return _bench(rest) if command == "bench" else _with_the_extra(command, rest)
    except (InputError, Overdue) as error:
        if os.environ.get("CMDP_FAST_TRACEBACK") == "1":
            _tell_all("".join(traceback.format_exception(error)))  # of several processes one has the cause
        each_machine = isinstance(error, ProcessLost) or not _have_met()
        _say(f"error: {error}", each_machine, alone=isinstance(error, ProcessAlone))
        return 2
    except Interrupted:
        return INTERRUPTED
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED


def overview(width: int) -> str:
    """What `cmdp-fast --help` prints."""
    lines = ["usage: cmdp-fast COMMAND [options]", "", "commands:"]
    for name, says in COMMANDS.items():
        lines += beside(name, says, width, len("  cache-teacher  "))
    lines += [
        "",
        *wrapped(
            "All but bench, doctor and info need the extra `train`: pip install '.[train]' in the checkout.", width
        ),
    ]
    lines += wrapped("`cmdp-fast COMMAND --help` has a command's options, `cmdp-fast --version` the version.", width)
    lines += ["", *wrapped(EXIT_CODES, width)]
    return "\n".join(lines)


def _without_options(command: str, arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        show("\n".join(wrapped(f"usage: cmdp-fast {command}: {COMMANDS[command]}", columns(sys.stdout))), sys.stdout)
        return 0
    if arguments:
        raise InputError(f"{command} takes no arguments, given: {' '.join(arguments)}")
    if command == "doctor":
        from .doctor import doctor

        return doctor()
    from .info import report

    show(report(), sys.stdout)
    return 0


class _Runner(NamedTuple):
    """A command in two halves: nothing that is large is imported before the command line has been read."""

    parse: Callable[[Sequence[str]], Any]
    load: Callable[[], Callable[[Any, Sequence[str]], int]]


@contextmanager
def _needing(command: str, of_extra: str) -> Iterator[None]:
    """Turns the error of an import into an InputError: what is not there comes with an extra, what is and cannot be
    imported says why."""
    try:
        yield
    except ImportError as error:
        cause = root_cause(error)  # transformers has errors of its own for those of what it imports
        package = (getattr(cause, "name", None) or "").partition(".")[0]
        if package == "cmdp_fast":
            raise
        if isinstance(cause, ModuleNotFoundError) and package and not _is_here(package):
            from .doctor.installed import names_of_extra

            known = [name.replace("-", "_") for name in names_of_extra(of_extra)]
            cure = f"comes with the extra: {extra(of_extra)}" if package in known or not known else "is not installed"
            raise InputError(f"{command} needs {package}, which {cure}") from error
        what = f"{package}, which is installed and" if package else "something that"
        why = readable(f"{type(cause).__name__}: {first_line(cause)}")
        raise InputError(f"{command} needs {what} cannot be imported: {why} (cmdp-fast doctor says more)") from error


def _is_here(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except Exception:  # of whatever else looks for modules in this process, and keeps this one away
        return True


def _with_the_extra(command: str, arguments: Sequence[str]) -> int:
    with _needing(command, "train"):
        runner = _runner(command)
        settings = runner.parse(arguments)
        if command != "report":  # which reads files alone, and imports none of them
            from .trainer.records.report import quiet_libraries

            quiet_libraries()
        return runner.load()(settings, arguments)


def _say(text: str, each_machine: bool = False, alone: bool = False) -> None:
    """Of several processes the first one speaks, of all or of `each_machine`: the others have the same to say
    (trainer/distributed.py), unless they have not met yet, or the one that speaks is lost. One that is `alone` with
    what it has to say speaks too."""
    if alone or os.environ.get("LOCAL_RANK" if each_machine else "RANK", "0") == "0":
        _tell_all(f"cmdp-fast: {text}")


def _have_met() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _tell_all(text: str) -> None:
    with suppress(ConsoleLost):  # the exit code says it too
        show(message(told(text), sys.stderr), sys.stderr)


def _runner(command: str) -> _Runner:
    """What reads a command's options, and what loads the function that runs it and returns the exit code."""
    if command == "compare":
        from .trainer.comparison.plan import parse_compare

        return _Runner(parse_compare, _load_compare)
    if command == "evaluate":
        from .trainer.evaluate_student import evaluate_student, parse_evaluate

        return _Runner(parse_evaluate, lambda: lambda config, _: _done(evaluate_student(config)))
    if command == "report":
        from .trainer.run_report.settings import parse_report

        return _Runner(parse_report, _load_report)
    if command == "teacher":
        from .trainer.serve_teacher import parse_teacher, serve_teacher

        def serve(settings: Any, arguments: Sequence[str]) -> int:
            serve_teacher(settings, arguments)
            return 0

        return _Runner(parse_teacher, lambda: serve)
    if command == "cache-teacher":
        from .trainer.cache_teacher import cache_teacher, parse_cache

        return _Runner(parse_cache, lambda: lambda config, _: _done(cache_teacher(config)))
    from .trainer.parse import parse

    return _Runner(parse, _load_train)


def _load_train() -> Callable[[Any, Sequence[str]], int]:
    from .trainer.dry_run import dry_run
    from .trainer.run import train

    return lambda config, arguments: _done(dry_run(config) if config.dry_run else train(config, arguments))


def _load_compare() -> Callable[[Any, Sequence[str]], int]:
    from .trainer.comparison.compare import compare

    return lambda config, arguments: 0 if compare(config, arguments) else 1


def _load_report() -> Callable[[Any, Sequence[str]], int]:
    from .trainer.run_report.command import write_report

    return lambda config, _: _done(write_report(config))


def _done(_: object) -> int:
    return 0


def _bench(arguments: Sequence[str]) -> int:
    for needed in ("rich", "matplotlib"):
        if not _is_here(needed):
            raise InputError(f"bench needs {needed}, which comes with the extra: {extra('bench')}")
    with _needing("bench", "bench"):
        from .bench.command import main as bench

        bench(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
