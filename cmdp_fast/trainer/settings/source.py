"""Where the problems come from, when the command line and what lies under it name two places."""

from __future__ import annotations

from cmdp_fast.errors import InputError

from .config import TrainConfig


def check_source(config: TrainConfig, base: TrainConfig) -> None:
    """Raises InputError where a task and a dataset are named: two on the command line, or one there and the other by
    the recipe or the run that goes on, whose settings are ``base``.

    The one does not replace the other: template, pattern and rewards of a recipe are those of its own problems.
    """
    if not (config.task and config.dataset):
        return
    own_task, own_dataset = config.task == base.task, config.dataset == base.dataset
    of = f"the run {config.resume}" if config.resume else f"the recipe {config.recipe}"
    if own_task == own_dataset:
        both = f"{of} has both" if own_task else f"--task {config.task} and --dataset {config.dataset}"
        raise InputError(f"{both}: give exactly one of --task and --dataset")
    if own_dataset:
        raise InputError(
            f"--task {config.task}: {of} has a dataset of its own ({config.dataset}): add --dataset= to leave it out"
        )
    asked = f"--dataset {config.dataset}: {of} has a task of its own ({config.task})"
    if config.student == base.student and config.student.startswith("builtin:arithmetic"):
        raise InputError(
            f"{asked}, and models that know nothing but sums. For data and models of your own take --recipe pair "
            f"--student MODEL --teacher MODEL --dataset {config.dataset}"
        )
    raise InputError(f"{asked}: add --task= to leave it out, or take --recipe pair, which has none")
