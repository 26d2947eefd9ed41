"""The engines of a run: of the student, and of the teacher where it is sampled from."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cmdp_fast import installation
from cmdp_fast.errors import InputError

from .engine.client import client_of, version_of
from .engine.engine import Engine
from .engine.nccl import Nccl
from .engine.probe import PROMPTS
from .engine.server import find_python
from .engine.weights import Adapter, Fixed, Weights, WholeModel, dtype_name
from .launch import host_count
from .material import Material
from .records.report import Report
from .rollout import encode_prompts
from .settings.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

Engines = tuple[Engine | None, Engine | None]  # of student and teacher
NONE: Engines = (None, None)


def make_engines(
    config: TrainConfig, accelerator: Accelerator, material: Material, report: Report, held: ExitStack
) -> Engines:
    """Those of student and teacher where `--rollout vllm` asks for them; they end with ``held``."""
    if config.rollout != "vllm":
        return None, None
    if not config.rollout_url and (hosts := host_count(accelerator)) > 1:
        raise InputError(
            f"--rollout vllm starts a server for one machine, and these are {hosts}: start servers that all reach, and "
            "name them with --rollout-url"
        )
    prompts = material.prompts or encode_prompts(material.held_out[:PROMPTS], material.tokenizer)

    def engine(role: str, urls: Sequence[str], weights: Weights) -> Engine:
        about: Any = {"role": role, "urls": urls, "weights": weights, "tokenizer": material.tokenizer}
        made = Engine(config, accelerator, report, prompts=prompts, longest=material.longest, **about)
        return held.enter_context(made)

    teacher = None
    if material.loaded_teacher is not None and (config.rollout_teacher_url or not config.rollout_url):
        fixed = Fixed(str(material.loaded_teacher.config.name_or_path))
        teacher = engine("teacher", config.rollout_teacher_url, fixed)
    return engine("student", config.rollout_url, _weights(config, accelerator, material)), teacher


def _weights(config: TrainConfig, accelerator: Accelerator, material: Material) -> Weights:
    """The student's, on the way that the settings ask for."""
    if config.lora_rank and not config.lora_modules_to_save:
        return Adapter(str(material.student.config.name_or_path), config.lora_rank)
    dtype = getattr(torch, dtype_name(config))
    if config.rollout_transfer == "nccl":
        return Nccl(material.tokenizer, dtype, accelerator.device, elsewhere=bool(config.rollout_url))
    # On a CPU vLLM packs the weights of a head, and does not pack those again that come with the embedding's
    untied = accelerator.device.type == "cpu" and not config.rollout_url
    return WholeModel(material.tokenizer, dtype, untied)


def check_engines(config: TrainConfig, is_main_process: bool = True) -> None:
    """Raises InputError, before a model is read, where there is no vLLM to start and none that this process reaches."""
    if config.rollout != "vllm":
        return
    for url in (*config.rollout_url, *config.rollout_teacher_url):
        version_of(client_of(url, config))
    if not is_main_process:  # which brings the weights
        return
    if config.rollout_folder and not Path(config.rollout_folder).is_dir():
        raise InputError(f"--rollout-folder {config.rollout_folder}: there is no such folder")
    if not config.rollout_url:
        find_python(config)
    if config.rollout_transfer == "nccl" and not (torch.cuda.is_available() and importlib.util.find_spec("vllm")):
        raise InputError(
            f"--rollout-transfer nccl needs a GPU, and vLLM beside the trainer: {installation.extra('vllm')}"
        )
