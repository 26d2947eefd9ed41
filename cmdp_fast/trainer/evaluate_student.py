"""`cmdp-fast evaluate`: the figures of a run's evaluations for any student, with or without a teacher.

It evaluates all that it is given: the sets of `--eval-dataset`, else the dataset. Of a task, which makes its own
problems, and of a dataset with `--held-out`, it takes those that a training with the same settings holds out, as that
does itself.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from cmdp_fast.errors import InputError, readable
from cmdp_fast.files import check_replaceable, write_json
from cmdp_fast.masking import masked, public, told
from cmdp_fast.terminal import drawn

from .command_line.options import sections_of
from .command_line.parsing import check_no_other
from .distributed import check_alike, main_first, on_device, together
from .engines import Engines, check_engines, make_engines
from .evaluate import EVALUATION_SEED, evaluate, of_several
from .experience import Collector
from .interrupts import Interrupts
from .launch import make_accelerator
from .material import Material, load
from .parse import parse_as
from .records.clock import Clock
from .records.report import Report
from .run import make_collector
from .settings.config import TrainConfig
from .settings.constraint import evaluation_constraint
from .settings.ranges import SEED, TEMPERATURE_OR_0
from .settings.recipe import read_recipe
from .settings.units import FILE, FOLDER, NUMBER, WHOLE
from .settings.unread import changed
from .tasks.data import Problem, evaluation_sets, held_out_alone

Figures = dict[str, float]


@dataclass(frozen=True)
class EvaluateConfig(TrainConfig):
    """What an evaluation has beside the settings of a training, whose recipe gives the task and the budget."""

    REQUIRED_MODELS: ClassVar[tuple[str, ...]] = ("student",)
    TRAINS: ClassVar[bool] = False
    ESSENTIAL: ClassVar[tuple[str, ...]] = (
        *("student", "teacher", "resume", "recipe", "task", "dataset", "eval_dataset", "eval_split", "held_out"),
        *("rewards", "budget", "max_new_tokens", "temperature", "eval_prompts", "eval_generations", "seeds", "json"),
    )
    UNREAD: ClassVar[tuple[str, ...]] = ("step", "optimizer")  # sections
    REFUSED: ClassVar[tuple[str, ...]] = (  # of other sections: settings of a training alone
        *("name", "output_dir", "checkpoint_every", "save_student_every", "keep", "trackers", "seed", "dry_run"),
        *("random_weights", "budget_start", "budget_steps", "penalty", "discrepancy_weight", "budget_price"),
        *("reward_unit", "coefficient", "kl_loss_correction", "pid_gains", "teacher_mix", "sampler_correction"),
        *("sampler_clip", "mask_truncated_completions", "rollout_ahead", "eval_every", "eval_before"),
    )

    temperature: Annotated[float, TEMPERATURE_OR_0, NUMBER] = 1.0
    """Temperature of the sampling. 0: the most likely token each time; divergences are then those of the policy at
    temperature 1."""
    held_out: bool = False
    """Of a dataset without `eval_split`, evaluate only the part that a training with these settings holds out."""
    resume: Annotated[str, FOLDER] = ""
    """Folder of a run, whose settings are taken: its `student/` is evaluated (`student` names another) on what the run
    was evaluated on. Code that it names runs only if you name it again, in the same words."""
    seeds: Annotated[tuple[int, ...], WHOLE] = ()
    """Seeds of the sampling; of several the mean is shown, and the standard deviation. Empty: a training's own. Figures
    that are to compare to the digit need the same `prompts_per_step` times `num_generations`, too: so many completions
    are sampled at once."""
    json: Annotated[str, FILE] = ""
    """File for the figures, beside the table on the terminal."""

    def validate(self) -> None:
        """Raises InputError on the first value that cannot work; no model or dataset is touched."""
        super().validate()
        if not self.temperature and (self.eval_generations > 1 or len(self.seeds) > 1):
            raise InputError("--temperature 0 gives the same completion each time: one generation and one seed are all")
        if self.held_out and (self.eval_dataset or self.eval_split):
            raise InputError(
                "--held-out is a part of --dataset: not with --eval-dataset or --eval-split, which are whole"
            )
        for seed in self.seeds:
            SEED.check("--seeds", seed)
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seeds {' '.join(map(str, self.seeds))}: one stands twice")


def parse_evaluate(args: Sequence[str], prog: str = "cmdp-fast evaluate") -> EvaluateConfig:
    """The configuration that the command line asks for, validated; see `parse_as`.

    Without `--eval-prompts`, on it or in a recipe for its dataset, all problems of a dataset are evaluated, and as many
    of a task's as in a training.
    """
    description = (
        "Measure a student on all problems of a dataset, or on the held-out ones of a task. A recipe gives task, "
        "teacher and budget; what it says of a training has no effect, but for --prompts-per-step times "
        "--num-generations: so many completions are sampled at once, and another number draws others. With an empty "
        "--teacher= the figures that compare with one are left out."
    )
    config = parse_as(EvaluateConfig, args, prog, description)
    check_no_other(EvaluateConfig, args, prog, INSTEAD)
    _check_method(config, args)
    asked = any(word.split("=")[0].replace("_", "-") == "--eval-prompts" for word in args)
    return config if asked or _takes_held_out(config) or _recipe_asks(config) else replace(config, eval_prompts=0)


INSTEAD = {
    "seed": "--seeds, of the sampling",
    **dict.fromkeys(("output-dir", "name"), "--json, a file for the figures"),
    "minibatch-size": "--micro-batch-size",
}
"""What was probably meant by options that are for a training."""


def _check_method(config: EvaluateConfig, args: Sequence[str]) -> None:
    """Raises InputError for a recipe beside a run, whose settings are taken, and for a method that changes nothing of
    what is evaluated."""
    named = {word.partition("=")[0] for word in args}
    for option in ("--recipe", "--method", "--fast", "--no-fast"):
        if config.resume and option in named:
            raise InputError(f"{option} would have no effect: the settings are those of --resume {config.resume}")
    if "--method" not in named or not config.method:  # a recipe may name one
        return
    with_it, without = (read_recipe(config.recipe, method, config.fast) for method in (config.method, ""))
    own = [name for name in changed(with_it, without) if getattr(config, name) == getattr(with_it, name)]
    other = replace(config, **{name: getattr(without, name) for name in own})
    try:
        same = _evaluated(config) == _evaluated(other)
    except ValueError:  # without the method's cost what was given beside it cannot be, such as a clamp
        same = False
    if same:
        raise InputError(
            f"--method {config.method} would have no effect: it changes nothing of what is evaluated, which --student "
            "names"
        )


def _evaluated(config: EvaluateConfig) -> dict[str, Any]:
    """What decides about an evaluation."""
    of_training = {o.name for s in sections_of(EvaluateConfig, None, "") if s.name in config.UNREAD for o in s.options}
    left_out = {*of_training, *config.REFUSED, "recipe", "method", "kind", "cost", "cost_clamp", "jsd_beta"}
    plain = replace(config, penalty=1.0, discrepancy_weight=1.0)  # of the modified reward, which is no figure
    read = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in left_out}
    return {**read, "constraint": evaluation_constraint(plain)}


def _recipe_asks(config: EvaluateConfig) -> bool:
    """Whether the recipe says how much is evaluated, of the problems that it names itself."""
    if config.resume:
        return False
    recipe = read_recipe(config.recipe, config.method, config.fast)
    own = (recipe.dataset, recipe.eval_dataset) == (config.dataset, config.eval_dataset) != ("", ())
    return own and recipe.eval_prompts != TrainConfig.eval_prompts


def _takes_held_out(config: EvaluateConfig) -> bool:
    held_out = config.held_out or config.resume
    return not config.eval_dataset and (bool(config.task) or bool(held_out and not config.eval_split))


def evaluate_student(config: EvaluateConfig) -> dict[str, Any]:
    """Prints the figures that `evaluate` and `of_several` document and returns them; writes them to the file that was
    asked for. Of several sets they are returned by name, as ``sets``.

    They are those that a run with the same settings reports of the same student. Raises InputError for anything that
    cannot be used, before anything is sampled, ConsoleLost if they could not be shown, and KeyboardInterrupt for Ctrl-C
    and SIGTERM.
    """
    with Interrupts():
        return _evaluate_student(config)


def _evaluate_student(config: EvaluateConfig) -> dict[str, Any]:
    if not config.json and sys.stdout is None:
        raise InputError("the standard output is closed, and --json names no file: the figures would be lost")
    accelerator = make_accelerator(config)
    with together(accelerator):
        check_engines(config, accelerator.is_main_process)
        if config.json and accelerator.is_main_process:
            check_replaceable(Path(config.json), f"--json {readable(config.json)}")
    report = Report(accelerator.is_main_process)
    sets = main_first(lambda: _sets(config), accelerator)
    material = main_first(lambda: load(config, report, sets), accelerator)
    check_alike(material.origin, accelerator)
    student = on_device(material.student, accelerator)
    figures: dict[str, Any] = {}
    with ExitStack() as held:
        engines = make_engines(config, accelerator, material, report, held)
        collector = _collector(config, accelerator, student, material, engines)
        for name, rows in material.sets.items():
            # Each process has a random state of its own, and none of one seed is one of another
            seeds = [seed * accelerator.num_processes for seed in config.seeds] or [EVALUATION_SEED]
            runs = [_figures(config, collector, student, rows, report, seed) for seed in seeds]
            figures[name] = _together(runs)
            report.result(figures_text(config, figures[name], name))
    found: dict[str, Any] = {"sets": figures} if len(figures) > 1 else next(iter(figures.values()))
    if config.json and accelerator.is_main_process:
        names = {"student": config.student, "teacher": config.teacher or None, "recipe": config.recipe}
        about: dict[str, Any] = masked(names)
        written = {"sets": {public(name): each for name, each in figures.items()}} if len(figures) > 1 else found
        about |= {"seeds": list(config.seeds)} if config.seeds else {}
        write_json(Path(config.json), {**about, "budget": config.budget if config.teacher else None, **written})
    report.check(f"the figures are in {config.json}" if config.json else "the figures are lost: --json keeps them")
    return found


def _sets(config: EvaluateConfig) -> dict[str, list[Problem]]:
    if _takes_held_out(config):
        return held_out_alone(config)
    return evaluation_sets(config)


def _collector(
    config: EvaluateConfig, accelerator: Any, student: Any, material: Material, engines: Engines
) -> Collector:
    """The collector of the student; the kernels divide by a temperature, which is 1 where none is sampled with."""
    collector = make_collector(
        replace(config, temperature=config.temperature or 1.0), accelerator, student, material, engines
    )
    if not config.temperature:
        collector.sampling = replace(collector.sampling, temperature=0.0)
    return collector


def _figures(
    config: EvaluateConfig, collector: Collector, student: Any, rows: list[Problem], report: Report, seed: int
) -> Figures:
    figures, samples = evaluate(collector, student, rows, Clock(), report, seed=seed)
    return figures | (of_several(samples, config.eval_generations) if config.eval_generations > 1 else {})


def _together(runs: list[Figures]) -> dict[str, Any]:
    """The figures of one seed, or the means over several with their standard deviations."""
    if len(runs) == 1:
        return runs[0]
    names = list(dict.fromkeys(name for run in runs for name in run if name != "examples"))
    values = {name: [run.get(name, 0.0) for run in runs] for name in names}  # absent: nothing of the kind happened
    spread = {name: _deviation(each) for name, each in values.items()}
    means = {name: statistics.fmean(each) for name, each in values.items()}
    return {**means, "examples": runs[0]["examples"], "standard_deviation": spread}


def _deviation(values: list[float]) -> float:
    """The sample's, NaN where a value is."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def figures_text(config: EvaluateConfig, figures: dict[str, Any], name: str = "") -> str:
    """A line per figure, below one that says of what they are."""
    from rich.table import Table

    unit = "nats per token" if config.budget_per_token else "nats"
    against = f"against {config.teacher}, budget {config.budget:g} {unit}" if config.teacher else "without a teacher"
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    spread = figures.get("standard_deviation", {})
    for figure, value in figures.items():
        if figure != "standard_deviation":
            both = f"{value:.4g} ± {spread[figure]:.2g}" if figure in spread else f"{value:.4g}"
            table.add_row(figure.replace("_", " "), both)
    return told(f"{config.student} {against}{f', on {name}' if name else ''}") + f"\n{drawn(table)}"
