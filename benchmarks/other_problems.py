"""The faulty teacher once more, evaluated on other problems.

    python benchmarks/other_problems.py [--seeds 0 1 2 3 4] [--out comparisons/study-other-problems]

The trainer's price of a nat was chosen with seeds of its own, but on the held-out problems on which `faulty-teacher` is
evaluated: the first 128, in the order of a hash. Here it is evaluated on the next 128. All else is that of the study,
for `cmdp` with its defaults: the same trainings, task and teacher. It checks the evaluation's problems and no more.

Written down before the runs, after those of `faulty-teacher`: 128 problems of four completions each, of which 5 % are
over budget, have a standard error of about a point by themselves, so a share that is within two points of the study's
says nothing; a price that fits its problems would keep more than two points fewer within most budgets.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from ablations import Variant, run_all, study_of

from cmdp_fast.trainer import material
from cmdp_fast.trainer.comparison.study.plan import read_study
from cmdp_fast.trainer.methods.ppo import PPO
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.tasks import data

NAME = "other-problems"
VARIANTS = (Variant("cmdp", "cmdp", PPO),)


def others(config: TrainConfig) -> data.Problems:
    """The problems of a training, with those in front that come after the ones that it is evaluated on."""
    train, held_out = data.load_problems(config)
    taken = config.eval_prompts
    if len(held_out) < 2 * taken:
        raise ValueError(f"{len(held_out)} held-out problems are not twice the {taken} of an evaluation")
    return data.Problems(train, held_out[taken:] + held_out[:taken])


def main(args: argparse.Namespace) -> bool:
    torch.set_num_threads(1)
    assert __doc__ is not None
    study = study_of(read_study("faulty-teacher"), VARIANTS, NAME, __doc__)
    study = replace(study, seeds=tuple(args.seeds or study.seeds))
    material.load_problems = others  # here, and in the trainings, which are forked
    return run_all(study, VARIANTS, args.out, ["python", "benchmarks/other_problems.py", *sys.argv[1:]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", help="those of the study")
    parser.add_argument("--out", type=Path, default=Path("comparisons") / f"study-{NAME}")
    raise SystemExit(not main(parser.parse_args()))
