"""Which settings go with models that have random weights in place of their own."""

from __future__ import annotations

from cmdp_fast.errors import InputError
from cmdp_fast.teachers.routed import KIND, places

from .models import ModelSettings
from .run import RunSettings


def check_random_weights(run: RunSettings, models: ModelSettings) -> None:
    """Raises InputError where random weights would be trained or sampled, or would say nothing of the real ones."""
    if not run.random_weights:
        return
    if not run.dry_run:
        raise InputError("--random-weights is for --dry-run alone: nothing is trained or sampled with them")
    if run.resume:
        raise InputError(f"--random-weights: --resume {run.resume} goes on with the weights that the run began with")
    if kind := models.teacher_quantization:
        raise InputError(f"--random-weights: --teacher-quantization {kind} quantises weights as they are read")
    teachers = [models.teacher]
    if models.teacher.startswith(f"{KIND}:"):
        teachers = list(places(models.teacher.removeprefix(f"{KIND}:")).values())
    for name in (models.student, *teachers):
        if name.startswith("builtin:"):
            raise InputError(f"--random-weights: {name} is made on this machine, weights and all: --dry-run alone")
