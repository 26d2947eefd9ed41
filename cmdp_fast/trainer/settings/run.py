"""Names and folders of the run, how it is resumed, what it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .ranges import NOT_NEGATIVE, POSITIVE, SEED
from .units import CHECKPOINTS, FOLDER, NAME, STEPS, WHOLE


@dataclass(frozen=True)
class RunSettings:
    """Names and folders of the run, how it is resumed, what it leaves."""

    recipe: Annotated[str, NAME] = "quickstart"
    """The defaults of this run, by name or by the path of a TOML file: quickstart, tempting, smollm2, pair,
    qwen2.5-24gb, qwen2.5-math, llama-3.2."""
    method: Annotated[str, NAME] = ""
    """How the budget is dealt with, by name or by the path of a TOML file: cmdp, hinge, saute, worst_case, lagrangian,
    pid, barrier, grpo, kl_reward, kl_loss, gkd, minillm, sft, kd. Its settings go over the recipe's. Empty: the
    recipe's own."""
    fast: bool = False
    """Take the quick form of the recipe. It has the settings of its table `[fast]`, to see in minutes what it shows."""
    name: Annotated[str, NAME] = ""
    """Name of the run's folder inside `output_dir`, which must not exist yet. Empty: the recipe's name, numbered if
    taken."""
    output_dir: Annotated[str, FOLDER] = "runs"
    """Folder that holds the runs."""
    resume: Annotated[str, FOLDER] = ""
    """Folder of a run that stopped, to be finished from its last checkpoint. Its settings are those of its
    `config.json`; only `steps`, `checkpoint_every`, `save_student_every`, `keep`, `eval_every`, `trackers` and what
    decides about memory alone (`micro_batch_size`, `gradient_checkpointing`, …) may be changed. Code that it names runs
    only if you name it again, in the same words, and figures go to trackers that you name again."""
    checkpoint_every: Annotated[int, NOT_NEGATIVE, STEPS] = 0
    """Write a checkpoint every so many steps and after the last one. 0: only when interrupted, and one for the time
    that the end of the run takes."""
    save_student_every: Annotated[int, NOT_NEGATIVE, STEPS] = 0
    """Put the student into `students/step-…` of the run's folder every so many steps, as a model that transformers
    loads. 0: only at the end, in `student/`."""
    keep: Annotated[int, POSITIVE, CHECKPOINTS] = 2
    """How many of the checkpoints, and of the students saved on the way, are kept: the last ones."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where the metrics go beside `metrics.jsonl`; wandb and trackio are packages that you install yourself. A run that
    is resumed goes on as the same run there."""
    seed: Annotated[int, SEED, WHOLE] = 0
    """Seed of the prompts' order and of the sampling."""
    dry_run: bool = False
    """Load and check all, estimate the memory, and stop. Settings are printed, models and data are loaded."""
    random_weights: bool = False
    """With `dry_run`: read configurations and tokenizers, a few MB, and no weights. The models get random ones in the
    shapes of their configurations, in little memory. That their files hold all weights is not checked."""
