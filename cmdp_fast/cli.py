"""The command line: `cmdp-fast train`, `cmdp-fast bench` and `cmdp-fast info`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

COMMANDS = """\
usage: cmdp-fast COMMAND [options]

commands:
  train   distil a student from a teacher under a KL budget (needs the extra: pip install 'cmdp_fast[train]')
  bench   speed, memory and error beside other libraries (needs the extra: pip install 'cmdp_fast[bench]')
  info    versions, CPU features, kernel variant, threads and backends

`cmdp-fast COMMAND --help` lists a command's options.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 for what the user has to change, 130 for an interrupt."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if command in ("-h", "--help"):
        print(COMMANDS, end="")
        return 0
    if command == "info":
        from .info import report

        print(report())
        return 0
    if command == "train":
        return _train(rest)
    if command == "bench":
        return _bench(rest)
    print(
        f"cmdp-fast: error: unknown command {command!r}\n{COMMANDS}" if command else COMMANDS, end="", file=sys.stderr
    )
    return 2


def _train(arguments: Sequence[str]) -> int:
    try:
        import datasets
        import transformers

        from .trainer.errors import InputError
        from .trainer.parse import parse
        from .trainer.run import train
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("cmdp_fast"):
            raise
        print(
            f"cmdp-fast: error: train needs {error.name}, which comes with the extra: pip install 'cmdp_fast[train]'",
            file=sys.stderr,
        )
        return 2

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    try:
        train(parse(arguments))
    except InputError as error:
        print(f"cmdp-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cmdp-fast: interrupted", file=sys.stderr)
        return 130
    return 0


def _bench(arguments: Sequence[str]) -> int:
    for needed in ("rich", "matplotlib"):
        if importlib.util.find_spec(needed) is None:
            print(
                f"cmdp-fast: error: bench needs {needed}, which comes with the extra: pip install 'cmdp_fast[bench]'",
                file=sys.stderr,
            )
            return 2
    from .bench.command import entry

    return entry(arguments)


if __name__ == "__main__":
    sys.exit(main())
