"""`cmdp-fast compare --study`: the trainings of a study that have no line yet, then its page.

Lines are appended when their training has ended, and its folder is removed. What is killed has no line and is run
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cmdp_fast.digest import read_sealed
from cmdp_fast.files import writing
from cmdp_fast.info import machine

from ...records.ending import SUMMARY
from ...records.lock import alone_in
from ...records.report import Report
from ...settings.config import TrainConfig, reward_name
from ..launching import jobs_of, remove, run_all
from ..plan import CompareConfig, folder_of, training_seconds
from .figures import by_kind, by_length, figures_of, kl_quantiles, samples_of
from .lines import FILE, Line, append_lines, read_lines
from .page import write_page
from .plan import AFTER, Study, Training, head, plan, read_study

RUNS, LOGS = "runs", "logs"


def run_study(config: CompareConfig, arguments: Sequence[str] = ()) -> bool:
    """Runs what has no line yet and writes the page; returns whether every training succeeded.

    ``arguments`` are the words of the command line, which the page quotes. Raises InputError, before anything is run,
    for a study that cannot be used.
    """
    report = Report()
    study = read_study(config.study)
    if config.seeds:
        study = replace(study, seeds=config.seeds)
    folder = folder_of(config)
    path = folder / FILE
    trainings = plan(study, folder / RUNS)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, report.say) as lock:
        done = {line.key for line in read_lines(path, report.say) if not line.failure}
        todo = {t.config.name: t for t in trainings if any(wanted.line.key not in done for wanted in t.wanted)}
        for training in trainings:  # what a kill has left, some of it after the line was written
            _clear(folder, training.config.name, report)
        jobs = jobs_of(config.jobs)
        report.say(
            f"{folder}: {len(trainings)} trainings, {len(trainings) - len(todo)} of them finished already, "
            f"{jobs} at a time"
        )
        origin = head(study, machine())
        for ended, failure in run_all([t.config for t in todo.values()], jobs, folder / LOGS, lock, report):
            lines = lines_of(todo[ended.name], study, failure)
            append_lines(path, lines, origin)
            if not any(line.failure for line in lines):
                _clear(folder, ended.name, report)
        of_study = {wanted.line.key for training in trainings for wanted in training.wanted}
        lines = [line for line in read_lines(path, report.say) if line.key in of_study]
        write_page(folder, study, lines, ["cmdp-fast", "compare", *arguments])
    failures = {line.training: line for line in lines if line.failure}.values()
    for line in failures:
        report.say(f"FAILED {line.training} ({line.candidate} in {line.situation}, seed {line.seed}): {line.failure}")
    return not failures


def _clear(folder: Path, name: str, report: Report) -> None:
    """Removes what is left of a training, or will be made anew: of many they are gigabytes."""
    remove(folder / RUNS / name, report)
    (folder / LOGS / f"{name}.log").unlink(missing_ok=True)


def lines_of(training: Training, study: Study, failure: str) -> list[Line]:
    """The lines of a training that has ended: with its figures, or with why it failed."""
    if not failure:
        folder = Path(training.config.output_dir) / training.config.name
        trained = training_seconds(read_sealed(folder / SUMMARY))
        try:
            samples = {who: samples_of(folder / "samples.jsonl", who) for _, who in training.wanted}
        except ValueError as error:
            failure = str(error)
    if failure:
        return [replace(line, failure=failure) for line, _ in training.wanted]
    return [
        replace(
            line,
            figures=figures_of(samples[who], line.budget, _unit(training.config))
            | ({"seconds": trained} if who == AFTER else {}),
            kl_quantiles=kl_quantiles(samples[who]),
            kinds=by_kind(samples[who], line.budget, study.kinds),
            lengths=by_length(samples[who], line.budget),
        )
        for line, who in training.wanted
    ]


def _unit(config: TrainConfig) -> float:
    """What a right answer is worth: the weight of the reward that says so, 1 if that is 0."""
    names = [reward_name(spec) for spec in config.rewards]
    weights = config.reward_weights or (1.0,) * len(names)
    return dict(zip(names, weights, strict=True))[config.accuracy_reward or names[0]] or 1.0
