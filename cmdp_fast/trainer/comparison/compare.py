"""A set of methods on one task, several seeds of each: every run in a process of its own, then tables and plots.

A run that fails costs itself alone and is reported. A run that is finished is not run again, so a comparison that was
killed goes on where it was; the folder of a run that is not finished is made anew.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from cmdp_fast.errors import InputError, first_line, readable
from cmdp_fast.files import check_encodable, check_writable, write_text, writing

from ..interrupts import Interrupts
from ..records.lock import alone_in
from ..records.report import Report
from ..records.session import command_line
from ..tasks.data import load_problems
from ..tasks.judge import Judge, compare_pairs, load_judge
from .alike import check_code, check_origins
from .launching import jobs_of, remove, run_all
from .plan import REFERENCES, CompareConfig, Result, SeededRun, check, folder_of, plan, summary_of
from .plots import plot_bars, plot_budgets, plot_pareto
from .study.run import run_study
from .table import csv_of_results, csv_of_rows, markdown, summarise, text_of


def compare(config: CompareConfig, arguments: Sequence[str] = ()) -> bool:
    """Runs those that are not yet finished, writes tables and plots; returns whether every run succeeded.

    ``arguments`` are the words of the command line, which the table quotes. Raises InputError, before anything is run,
    for settings that cannot be used. Ctrl-C and SIGTERM end the trainings too, and raise KeyboardInterrupt.
    """
    with Interrupts():
        return _compare(config, arguments)


def _compare(config: CompareConfig, arguments: Sequence[str]) -> bool:
    check(config)
    check_encodable(str(folder_of(config)), f"--output-dir {readable(str(folder_of(config)))}")
    check_writable(folder_of(config), f"--output-dir {readable(str(folder_of(config)))}")
    if config.study:
        return run_study(config, arguments)
    report = Report()
    runs = plan(config)
    labels = tuple(dict.fromkeys(run.variant.label for run in runs))
    if config.judge_against not in (*REFERENCES, *labels):
        raise InputError(f"--judge-against {config.judge_against}: expected one of {', '.join((*REFERENCES, *labels))}")
    if config.judge_against != CompareConfig.judge_against and not config.judge:
        raise InputError(f"--judge-against {config.judge_against} would have no effect: it is for --judge")
    evaluated = {
        "teacher": all(run.config.evaluates_teacher for run in runs),
        "student_before": all(run.config.eval_before for run in runs),
    }
    if config.judge and not evaluated.get(config.judge_against, True):
        raise InputError(
            f"--judge-against {config.judge_against}: there are no completions of a teacher that is asked, nor with "
            f"--no-eval-before; expected one of {', '.join((*(who for who in REFERENCES if evaluated[who]), *labels))}"
        )
    judge = load_judge(config.judge, runs[0].config, load_problems(runs[0].config).train[0]) if config.judge else None
    folder = folder_of(config)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, report.say) as lock:
        finished = {run.folder: summary for run in runs if (summary := summary_of(run)) is not None}
        done = [run for run in runs if run.folder in finished]
        todo = [run for run in runs if run.folder not in finished]
        check_code(done)
        check_origins(done)
        for run in todo:
            remove(run.folder, report)
        jobs = jobs_of(config.jobs)
        report.say(f"{folder}: {len(runs)} runs, {len(finished)} of them finished already, {jobs} at a time")
        ended = run_all([run.config for run in todo], jobs, folder / "logs", lock, report)
        failures = {run.name: why for run, why in ended if why}
        results = [Result(run, summary_of(run), failures.get(run.config.name, "")) for run in runs]
        check_origins([*done, *(r.run for r in results if r.run in todo and r.summary is not None)])
        if judge is not None:
            results = judged(results, judge, config.judge_against, report)
        write(folder, results, ["cmdp-fast", "compare", *arguments], report)
    for result in results:
        if result.summary is None:
            report.say(f"FAILED {result.run.config.name}: {result.failure}")
    if not all(result.summary is not None for result in results):
        return False
    report.check(f"the table is in {folder / 'table.md'}")
    return True


# ---------------------------------------------------------------------------------------------------- the results


def judged(results: list[Result], judge: Judge, against: str, report: Report) -> list[Result]:
    """The results with win, tie and loss rates against the completions of the same problems by somebody else."""
    finished = {(r.run.variant.label, r.run.config.seed): r for r in results if r.summary is not None}
    rows = {json.dumps(row["prompt"]): row for row in load_problems(results[0].run.config).held_out}
    done = []
    for result in report.track(results, f"judging against {against}"):
        other = result if against in REFERENCES else finished.get((against, result.run.config.seed))
        if result.summary is not None and other is not None and (against in REFERENCES or other is not result):
            ours = samples_of(result.run, "student_after")
            theirs = samples_of(other.run, against if against in REFERENCES else "student_after")
            pairs = [key for key in ours if key in theirs and key[0] in rows]
            if pairs:
                texts = [ours[k] for k in pairs], [theirs[k] for k in pairs]
                preferences = compare_pairs(judge, [rows[key[0]] for key in pairs], *texts)
                result = replace(result, judged=asdict(preferences))
        done.append(result)
    return done


def samples_of(run: SeededRun, who: str) -> dict[tuple[str, int], str]:
    """The completions in a run's `samples.jsonl` by prompt and their number among those of the prompt.

    Raises InputError for a line that no training has written.
    """
    completions: dict[tuple[str, int], str] = {}
    path, seen = run.folder / "samples.jsonl", Counter[str]()
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                sample = json.loads(line)
                prompt, completion = json.dumps(sample["prompt"]), sample["completion"]
                if not isinstance(completion, str):
                    raise TypeError("its completion is no text")
                if sample["who"] == who:
                    completions[prompt, seen[prompt]] = completion
                    seen[prompt] += 1
            except (ValueError, RecursionError, LookupError, TypeError) as error:
                raise InputError(f"{path}, line {number}: expected a sample: {readable(first_line(error))}") from error
    return completions


def write(folder: Path, results: list[Result], command: list[str], report: Report) -> None:
    """`results.csv`, and of the finished runs `table.csv`, `table.md`, the plots, and the table on the terminal."""
    write_text(folder / "results.csv", csv_of_results(results))
    rows = summarise(results)
    if not rows:
        return
    write_text(folder / "table.csv", csv_of_rows(rows))
    write_text(folder / "table.md", markdown(rows, command_line(command)))
    plot_bars(folder / "comparison.png", rows)
    plot_pareto(folder / "pareto.png", rows)
    plots = ["comparison.png", "pareto.png"]
    if plot_budgets(folder / "budget.png", rows):
        plots.append("budget.png")
    report.result(text_of(rows))
    report.say(f"{folder}: results.csv table.csv table.md {' '.join(plots)}")
