"""A model's files before they are believed: sizes that its weights can have, numbers that are weights, a tokenizer that
reads and writes, settings of sampling that can be saved.

The files are somebody else's. The libraries that read them build what `config.json` describes before they look at the
weights, and a tokenizer or a setting that cannot be may show itself only where a training writes its student.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cmdp_fast.errors import InputError, first_line, shown
from cmdp_fast.vocabulary import decoded, encoded, named_ends
from cmdp_fast.weight_files import stored_tensors

LAYERS, EXPERTS = 1024, 1 << 14  # of a model: more modules than any has, and few enough to be made in seconds
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes of safetensors that hold a weight as it is
PROBES = ("a", "1 + 1 =\n", "\N{CJK UNIFIED IDEOGRAPH-4E00}")
UNSAMPLED = {  # what a model without `do_sample` reads none of, and where that is the default
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 50, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0},
    **{"min_p": None, "top_h": None},
}


def check_counts(role: str, name: str, about: Any) -> None:
    """Raises InputError for a configuration of no layers or of more layers or experts than a model has: each is a
    module that would be made."""
    for settings in (about, about.get_text_config()):
        for key, count in vars(settings).items():
            is_layers = key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
            if type(count) is not int or not (is_layers or "experts" in key):
                continue
            least, most = (1, LAYERS) if is_layers else (-1, EXPERTS)
            if not least <= count <= most:
                raise InputError(
                    f"--{role} {name}: its config.json has {key} {shown(count)}, expected {max(least, 0)} to {most}"
                )


def is_quantised(about: Any) -> bool:
    """Whether transformers knows how the weights of such a model are packed; an unknown way it passes over."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    settings = getattr(about, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, Mapping) else getattr(settings, "quant_method", None)
    return getattr(method, "value", method) in AUTO_QUANTIZATION_CONFIG_MAPPING


def check_weights(role: str, name: str, about: Any, trusted: bool) -> None:
    """Raises InputError if the weights in a model's folder are not those of the model that its configuration describes:
    by far fewer numbers, for which memory would be taken first, or by numbers that are no weights.

    Of a hub's model, which has yet to be fetched, nothing is looked at, and of quantised weights nothing either.
    """
    if not Path(name).is_dir() or is_quantised(about):
        return
    try:
        stored = stored_tensors(Path(name))
    except ValueError:
        return  # what is wrong with a file is said where it is read
    if not stored:
        return
    described = _described(role, name, about, trusted)
    size, held = sum(tensor.numel() for tensor in _once(described)), sum(math.prod(t.shape) for t in stored.values())
    if size > 2 * held:
        raise InputError(
            f"--{role} {name}: its config.json describes a model of {size:,} weights, and its files hold {held:,}"
        )
    for key, tensor in stored.items():
        if key in described and described[key].is_floating_point() and tensor.dtype not in FLOATS:
            raise InputError(
                f"--{role} {name}: its {shown(key)} is stored as {tensor.dtype}, expected {', '.join(FLOATS)}: its "
                "config.json names no quantization that transformers knows, so the numbers are no weights"
            )


def _described(role: str, name: str, about: Any, trusted: bool) -> dict[str, torch.Tensor]:
    """The tensors of a model of this configuration, as shapes alone."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(about, trust_remote_code=trusted)
    except Exception as error:  # of a library that makes what anybody describes
        raise InputError(f"--{role} {name}: no causal language model in this folder: {first_line(error)}") from error
    model.tie_weights()
    tensors: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    return tensors


def _once(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Without those that are another one under a second name."""
    return list({id(tensor): tensor for tensor in tensors.values()}.values())


def check_tokenizer(role: str, name: str, tokenizer: Any) -> None:
    """Raises InputError for a tokenizer that cannot read or write a text."""
    try:
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise InputError(f"model_max_length is {shown(tokenizer.model_max_length)}, expected a number")
        for text in PROBES:
            ids = encoded(tokenizer, text)
            decoded(tokenizer, ids)
            encoded(tokenizer, text, add_special_tokens=False)
    except InputError as error:
        raise InputError(f"--{role} {name}: its tokenizer cannot be used: {error}") from error


def make_savable(role: str, name: str, settings: Any) -> None:
    """Takes from a model's settings of `generate` what they cannot be saved with: those of sampling beside no
    `do_sample`, which change nothing and stand beside many a model. Raises InputError for others.

    transformers reads such settings and refuses to write them, which would be after the training.
    """
    if getattr(settings, "do_sample", None) is not True:
        for key, default in UNSAMPLED.items():
            if hasattr(settings, key):
                setattr(settings, key, default)
    try:
        named_ends((settings,))
        settings.validate(strict=True)
    except Exception as error:  # TypeError for what has no order
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        said = lines[1] if len(lines) > 1 and lines[0].endswith("invalid:") else first_line(error)
        raise InputError(
            f"--{role} {name}: its generation_config.json cannot be saved with the student: {shown(said)}"
        ) from error
