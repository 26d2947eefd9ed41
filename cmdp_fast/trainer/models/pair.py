"""Loading the pair: student, teacher and the tokenizer that they must share."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cmdp_fast.errors import InputError, first_line, readable
from cmdp_fast.teachers.open import check_vocabulary, is_asked, open_teacher
from cmdp_fast.teachers.routed import KIND, RoutedTeacher, places
from cmdp_fast.teachers.teacher import Asking, Teacher
from cmdp_fast.vocabulary import check_tokenizers
from cmdp_fast.weight_files import INDEX, ONE, QUIET, check_weight_files, read_index

from ..causal_lm import CausalLM
from ..records.origin import model_digest
from ..records.report import Report
from ..settings.config import TrainConfig
from ..sources import alike, check_path, find_hub, loading, with_hub
from ..stops import end_tokens, keep_end_tokens
from ..tasks.data import Problem
from .adapter import FrozenBase, add_adapter
from .believable import (
    CONFIG,
    check_config,
    check_counts_in_file,
    check_generation,
    check_small_files,
    check_tokenizer,
    check_weights,
    make_config_savable,
    why_no_config,
)
from .builtin import builtin_folder
from .failing import in_process
from .quantization import effect, quantization_config, read_prompts
from .random_weights import RandomCausalLM, check_plain
from .recompute import recompute_layers
from .smollm2 import smollm2_folder


class Found(NamedTuple):
    """What is known of student and teacher before their weights are read: by role, the teacher where there is one that
    is loaded."""

    folders: dict[str, str]  # or hub ids
    configs: dict[str, Any]
    tokenizers: dict[str, Any]
    asked: Teacher | None = None

    @property
    def tokenizer(self) -> Any:
        """The student's, ready for prompts."""
        return self.tokenizers["student"]


@loading()
def find_pair(config: TrainConfig, train: Sequence[Problem], report: Report) -> Found:
    """Where student and teacher are, their configurations and tokenizers; built-in ones are made if they are not there.

    Raises InputError if one is not there, or if the tokenizers differ.
    """
    from transformers import AutoTokenizer

    check_attention(config)
    loaded = config.teacher and not config.asks_teacher
    sources = {"student": config.student, **({"teacher": config.teacher} if loaded else {})}
    folders, configs, tokenizers = {}, {}, {}
    trusted = config.trust_remote_code
    for role, name in sources.items():  # everything cheap before anything is trained or read
        if not name.startswith("builtin:"):
            folders[role] = name
            configs[role] = _configuration(role, name, name, config)
            tokenizers[role] = _load(AutoTokenizer, role, name, trusted)
            check_tokenizer(role, name, tokenizers[role])
    for role, name in sources.items():
        if name.startswith("builtin:"):
            made = smollm2_folder(name, report) if "smollm2" in name else builtin_folder(name, config, train, report)
            folders[role] = str(made)
            configs[role] = _configuration(role, name, folders[role], config)
            tokenizers[role] = _load(AutoTokenizer, role, folders[role], trusted)
    asked = None
    if loaded:
        check_tokenizers(tokenizers["student"], tokenizers["teacher"])
    elif config.teacher:
        asked = _opened(config, train, report)
        check_vocabulary(asked, tokenizers["student"])

    tokenizer = tokenizers["student"]
    tokenizer.padding_side = "left"
    if tokenizer.eos_token_id is None:
        raise InputError(f"--student {config.student}: its tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Found(folders, configs, tokenizers, asked)


def _opened(config: TrainConfig, train: Sequence[Problem], report: Report) -> Teacher:
    """The teacher that is asked; of several those that are folders or a hub's models are loaded, and asked in this
    process."""
    asking = Asking(config.teacher_timeout, config.teacher_token_file, config.teacher_wire)
    if not config.teacher.startswith(f"{KIND}:"):
        return open_teacher(config.teacher, asking)

    def opened(name: str) -> Teacher:
        if is_asked(name):
            return open_teacher(name, asking)
        alone = replace(config, teacher=name)
        model, tokenizer, folder = load_alone("teacher", alone, _frozen_dtype(config), lambda: train, report)
        ends = _ends("teacher", name, model, tokenizer)
        teacher = in_process(model, tokenizer, name, model_digest(folder), ends)
        teacher.moves = True
        return teacher

    return RoutedTeacher(
        {name: opened(place) for name, place in places(config.teacher.removeprefix(f"{KIND}:")).items()}
    )


@loading()
def load_pair(
    config: TrainConfig, train: Sequence[Problem], report: Report, found: Found | None = None
) -> tuple[CausalLM, CausalLM | Teacher | None, Any]:
    """(student, teacher, tokenizer), on the CPU; the teacher frozen, or None if the configuration names none.

    The weights that are trained are float32: all of the student's, or those of its adapter. A teacher that is the
    student without its adapter is a `FrozenBase`; one that stays on the CPU is asked there. ``found``: what `find_pair`
    says, if it was asked already. Raises InputError if a model cannot be loaded or used as the configuration says, or
    if the tokenizers differ.
    """
    found = found or find_pair(config, train, report)
    folders, _, tokenizers, asked = found
    tokenizer = tokenizers["student"]
    own = _frozen_dtype(config) if config.lora_rank else torch.float32
    student, dropped = _load_model("student", folders["student"], own, config)
    if dropped:
        report.say(
            f"--student {config.student}: its files hold tensors without a place in a {type(student).__name__} "
            f"({len(dropped)}, {_common_name(dropped)}): they are not read, and a saved student has none of them"
        )
    if left_out := make_config_savable("student", config.student, student.config):
        report.say(
            f"--student {config.student}: transformers refuses to write {', '.join(left_out)} of its config.json "
            f"beside the attention {student.config._attn_implementation}, and the saved student has none"
        )
    _ends("student", config.student, student, tokenizer)
    if config.gradient_checkpointing:
        recompute_layers(student)
    if config.lora_rank:
        add_adapter(student, config)
    student.eval()  # dropout off throughout: PPO's ratio has to be 1 where the policy has not changed
    if "teacher" not in folders:
        return student, asked, tokenizer
    if config.lora_rank and folders["student"] == folders["teacher"]:
        return student, FrozenBase(student), tokenizer
    teacher = load_teacher(config, found)
    if config.teacher_device == "cpu":
        ends = _ends("teacher", config.teacher, teacher, tokenizers["teacher"])
        return student, in_process(teacher, tokenizers["teacher"], config.teacher, ends=ends), tokenizer
    return student, teacher, tokenizer


@loading()
def load_teacher(config: TrainConfig, found: Found) -> CausalLM:
    """The teacher alone, frozen, on the CPU, or quantised where its package puts it. Raises InputError if it cannot be
    loaded."""
    kind = config.teacher_quantization
    teacher, _ = _load_model("teacher", found.folders["teacher"], _frozen_dtype(config), config, kind)
    ends = _ends("teacher", config.teacher, teacher, found.tokenizers["teacher"])
    keep_end_tokens(teacher, ends)  # its tokenizer is not needed after this
    frozen: CausalLM = teacher.eval().requires_grad_(False)
    return frozen


def _ends(role: str, name: str, model: CausalLM, tokenizer: Any) -> tuple[int, ...]:
    """`end_tokens`, whose error says whose they are."""
    try:
        return end_tokens(model, tokenizer)
    except InputError as error:
        raise InputError(f"--{role} {name}: {error}") from error


def _frozen_dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


@loading()
def load_alone(
    role: str,
    config: TrainConfig,
    dtype: torch.dtype | None,
    train: Callable[[], Sequence[Problem]],
    report: Report,
    parallel: bool = False,
) -> tuple[CausalLM, Any, str]:
    """(teacher, tokenizer, folder or hub id) where there is no student: on the CPU, frozen, in a dtype or that of its
    files. ``role``: the option that names it, for messages; ``train``: the problems that a built-in one is made of;
    ``parallel``: a part of each layer, on the device of this process, by transformers' own plan."""
    from transformers import AutoTokenizer

    check_attention(config)
    name = folder = config.teacher
    if name.startswith("builtin:"):
        smollm2 = "smollm2" in name
        folder = str(smollm2_folder(name, report) if smollm2 else builtin_folder(name, config, train(), report))
    about = _configuration(role, name, folder, config)
    if parallel and not getattr(about.get_text_config(), "base_model_tp_plan", None):
        raise InputError(f"--{role} {name}: transformers has no plan for its layers in tensor parallelism")
    tokenizer = _load(AutoTokenizer, role, folder, config.trust_remote_code)
    check_tokenizer(role, folder, tokenizer)
    model, _ = _load_model(role, folder, dtype or "auto", config, **(_in_parts() if parallel else {}))
    return model.eval().requires_grad_(False), tokenizer, folder


def compare_quantised(config: TrainConfig, found: Found, quantised: Any, prompts: Sequence[Sequence[int]]) -> str:
    """A line on how far a quantised teacher is from the full one, which is loaded for this and dropped again."""
    full, _ = _load_model("teacher", found.folders["teacher"], _frozen_dtype(config), config)
    return effect(read_prompts(quantised, prompts), read_prompts(full.eval(), prompts))


def _load_model(
    role: str, name: str, dtype: torch.dtype | str, config: TrainConfig, quantization: str = "", **options: Any
) -> tuple[Any, list[str]]:
    """A causal language model from safetensors, which hold numbers and nothing that could run (`_check_files` has seen
    to it that its folder names no others); and the tensors of its files that transformers leaves out. With
    `--random-weights` one without its files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options["dtype"] = dtype
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if config.random_weights:
        check_plain(role, name, _load(AutoConfig, role, name, config.trust_remote_code))
        return _load(RandomCausalLM, role, name, config.trust_remote_code, **options), []
    check_weights(role, name, _load(AutoConfig, role, name, config.trust_remote_code), config.trust_remote_code)
    options |= {"use_safetensors": True, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # its own error names no tensor
    if quantization:
        options["quantization_config"] = quantization_config(quantization)
    model, info = _load(AutoModelForCausalLM, role, name, config.trust_remote_code, **options)
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random numbers in their place
        raise InputError(
            f"--{role} {name} lacks {len(missing)} of the weights of a {type(model).__name__}: {missing[0]}, …"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        tensor, stored, expected = mismatched[0]
        raise InputError(
            f"--{role} {name}: its {tensor} is {list(stored)}, and a {type(model).__name__} with its config.json has "
            f"{list(expected)} there ({len(mismatched)} such)"
        )
    return model, _dropped(model, name, info["unexpected_keys"])


def _in_parts() -> dict[str, Any]:
    """What has transformers spread a model over the processes, in the words of its version."""
    from transformers.distributed import DistributedConfig

    if "tp_plan" in DistributedConfig.__dataclass_fields__:
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    return {"tp_plan": "auto"}


def _dropped(model: Any, name: str, unexpected: Iterable[str]) -> list[str]:
    """The names of the tensors that a model's files hold and the model does not.

    transformers tells of those that it does not expect, and keeps silent about others that its architecture ignores on
    purpose, such as the layers of multi-token prediction.
    """
    from safetensors import safe_open
    from transformers.utils import cached_file

    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    stored: list[str] = []
    if file := cached_file(name, ONE, **QUIET):  # first of all, as transformers has it
        with safe_open(file, "pt") as tensors:
            stored = list(tensors.keys())
    elif index := cached_file(name, INDEX, **QUIET):
        stored = list(read_index(Path(index)))
    silent = {key for key in stored if any(re.search(pattern, key) for pattern in ignored)} - model.state_dict().keys()
    return sorted(silent | set(unexpected))


def _common_name(names: list[str]) -> str:
    """What the names have in common, in whole parts: `mtp.…`; without that, the first of them."""
    parts = zip(names[0].split("."), names[-1].split("."), strict=False)  # they are sorted
    start = ".".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], parts))
    return (names[0] if len(names) == 1 else f"{start}.…" if start else f"{names[0]}, …")[:100]


def _configuration(role: str, name: str, folder: str, config: TrainConfig) -> Any:
    """What a model's folder says that it is, once it is known to be believable. ``name``: as the user named it."""
    from transformers import AutoConfig
    from transformers.utils import cached_file

    _check_place(role, folder)
    if Path(folder).is_dir():
        check_small_files(role, folder)
    try:
        path = cached_file(folder, CONFIG, **QUIET)
    except Exception:  # of the hub's library; it is said by what reads it next
        path = None
    if path:
        check_counts_in_file(role, folder, Path(path))
    about = _load(AutoConfig, role, folder, config.trust_remote_code)
    _check_own_attention(role, name, about, config)
    _check_files(role, folder, about)
    check_config(role, folder, about)
    return about


def _check_place(role: str, name: str) -> None:
    """Raises InputError for what is neither the folder of a model nor a hub id; makes ready for one."""
    try:
        there = Path(name).is_dir()
    except OSError as error:  # a folder above it is somebody else's alone
        raise InputError(f"--{role} {name} cannot be read: {first_line(error)}") from error
    if not there:
        check_path(f"--{role}", name, file_too=False)
        if Path(name).exists():
            raise InputError(f"--{role} {name} is a file, expected a hub id or the folder of a model")
        find_hub()


@loading()
def _load(auto: Any, role: str, name: str, trusted: bool, **options: Any) -> Any:
    _check_place(role, name)
    try:
        return auto.from_pretrained(name, trust_remote_code=trusted, **options)
    except Exception as error:  # of libraries that read anybody's files, in whatever form
        if _attention_failed(error, attention := options.get("attn_implementation", "")):
            raise InputError(f"--attn-implementation {attention}: {role} {name}: {first_line(error)}") from error
        kind = "folder" if Path(name).is_dir() else "hub id or folder"
        reason = readable(first_line(error), 600)
        if kind == "folder" and (fault := why_no_config(Path(name))):
            raise InputError(f"--{role} {name}: no causal language model in this folder: {fault}") from error
        if "trust_remote_code" in str(error):
            raise InputError(
                f"--{role} {name} comes with code of its own, which would run: --trust-remote-code if you have read it"
            ) from error
        if options.get("use_safetensors") and "safetensors" in reason:
            raise InputError(
                f"--{role} {name}: no safetensors in this {kind}. Other files are pickles, which can run code as they "
                "are read; convert them with save_pretrained where you trust them"
            ) from error
        said = f"--{role} {name}: no causal language model in this {kind}: {with_hub(reason, name)}"
        raise InputError(said + (alike(Path(name)) if kind != "folder" else "")) from error


def check_attention(config: TrainConfig) -> None:
    """Raises InputError for an implementation of attention that transformers does not know, that is not installed, or
    that is code from the hub."""
    from transformers import AttentionInterface
    from transformers.utils import import_utils

    name = config.attn_implementation
    if "/" in name and not config.trust_remote_code:
        raise InputError(
            f"--attn-implementation {name} is code from the hub, which would run: --trust-remote-code if you have read "
            "it"
        )
    known = ["eager", *sorted(key for key in AttentionInterface().valid_keys() if "|" not in key)]
    if name and "/" not in name and name not in known:
        raise InputError(f"--attn-implementation {name}: transformers has {', '.join(known)}")
    if name.startswith("flash_") and config.precision == "no":
        raise InputError(f"--attn-implementation {name} computes in half precision: it needs --mixed-precision bf16")
    version = name.removeprefix("flash_attention_")
    installed = getattr(import_utils, f"is_flash_attn_{version}_available", None)
    if version != name and installed is not None and not installed():
        raise InputError(f"--attn-implementation {name} needs the package flash-attn and a GPU that it serves")


def _check_own_attention(role: str, name: str, about: Any, config: TrainConfig) -> None:
    """The same for the implementation that a model's own configuration asks for."""
    kernel = str(getattr(about, "_attn_implementation", None) or "")
    if "/" in kernel and not config.trust_remote_code:
        raise InputError(
            f"--{role} {name} asks for the attention of {kernel}, which is code from the hub: "
            "--trust-remote-code if you have read it"
        )


def _check_files(role: str, name: str, about: Any) -> None:
    """Raises InputError for a model whose folder has transformers read other files than safetensors in it, or pass over
    its settings of `generate`."""
    check_generation(role, name)
    try:
        check_weight_files(name, about)
    except Exception as error:  # those of the hub's library among them
        raise InputError(f"--{role} {name}: {with_hub(first_line(error), name)}") from error


def _attention_failed(error: BaseException, attention: str) -> bool:
    return bool(attention) and any(word in str(error).lower() for word in ("attention", "attn", attention))
