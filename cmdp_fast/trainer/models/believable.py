"""A model's files before they are believed: sizes that its weights can have, numbers that are weights, a tokenizer that
reads and writes, settings of `generate` that can be saved.

The files are somebody else's. The libraries that read them build what `config.json` describes before they look at the
weights, and a tokenizer or a setting that cannot be may show itself only where a training writes its student.
"""

from __future__ import annotations

import codecs
import copy
import inspect
import json
import math
import os
import tempfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from cmdp_fast.errors import InputError, first_line, readable, shown
from cmdp_fast.vocabulary import decoded, encoded
from cmdp_fast.weight_files import ADAPTER, stored_tensors

from ..records.origin import too_large, whole_files

CONFIG, GENERATION = "config.json", "generation_config.json"
LONGEST = 1 << 24  # bytes of a file of settings, which has some thousand
LAYERS, EXPERTS = 1024, 1 << 14  # of a model: more modules than any has, and few enough to be made in seconds
LABELS = 1 << 20  # transformers makes a table of their names
OF_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
READ = (  # beside the weights; what is none of a file's kind transformers passes over
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("chat_template.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
)
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes of safetensors that hold a weight as it is
PROBES = ("a", "1 + 1 =\n", "\N{CJK UNIFIED IDEOGRAPH-4E00}")
WORDS = 64  # of a tokenizer's own, where it knows none of these
KEPT = ("eos_token_id", "transformers_version")  # of the settings of `generate`


def _too_long(path: Path) -> str:
    size = path.stat().st_size
    return f"has {size:,} bytes, expected at most {LONGEST:,}" if size > LONGEST else ""


def json_fault(path: Path) -> str:
    """Why a file is no object in JSON, behind its name; "" if it is one."""
    try:
        if not path.is_file():
            return "is no file" if os.path.lexists(path) else "is not there"
        if long := _too_long(path):
            return long
        content = path.read_bytes()
    except OSError as error:
        return f"cannot be read: {error.strerror or first_line(error)}"
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError:
        wide = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
        kind = next((f": it begins as {name} does" for mark, name in wide.items() if content.startswith(mark)), "")
        return f"is no text in UTF-8{kind}"
    except json.JSONDecodeError as error:
        if content.startswith(codecs.BOM_UTF8):
            return "begins with a mark of the byte order, expected JSON in UTF-8 without one"
        return f"is no JSON: line {error.lineno}: {error.msg}" if content.strip() else "is empty"
    except (ValueError, RecursionError):
        return "is too deep, or holds too long a number"
    return "" if isinstance(value, dict) else "holds no object"


def why_no_config(folder: Path) -> str:
    """What is wrong with a folder that transformers finds no configuration in; "" if its config.json is one."""
    if fault := json_fault(folder / CONFIG):
        adapter = fault == "is not there" and (folder / ADAPTER).exists()
        hint = f" (it is an adapter, with an {ADAPTER}: merge it into its model)" if adapter else ""
        return f"its {CONFIG} {fault}{hint}"
    return ""


def check_generation(role: str, name: str) -> None:
    """Raises InputError for settings of `generate` that are no JSON: transformers passes them over, and the model would
    end at other tokens than its own. So for a link to nothing and what is no file; a model may have none."""
    path = Path(name) / GENERATION
    if os.path.lexists(path) and (fault := json_fault(path)):
        raise InputError(f"--{role} {name}: its {GENERATION} {fault}")


def check_small_files(role: str, name: str) -> None:
    """Raises InputError for a folder with a chat template or a part of a tokenizer that is no file, which transformers
    would pass over, or with one that would be read whole and is too large for that."""
    folder = Path(name)
    try:
        templates = [*(folder / "additional_chat_templates").glob("*.jinja")]
        for path in (*(folder / each for each in READ), *templates):
            if os.path.lexists(path) and not path.is_file():
                raise InputError(f"--{role} {name}: its {readable(path.name)} is no file")
        fault = too_large([*whole_files(folder), *templates])
    except OSError as error:
        raise InputError(f"--{role} {name} cannot be read: {first_line(error)}") from error
    if fault:
        raise InputError(f"--{role} {name}: {fault}")


def check_counts_in_file(role: str, name: str, path: Path) -> None:
    """Raises InputError for a config.json with more layers, experts or labels than a model has, at any depth: for some
    of them transformers makes a list as long, before anybody can look at it. What else is wrong with the file is said
    where it is read."""
    if path.is_file() and (long := _too_long(path)):
        raise InputError(f"--{role} {name}: its {CONFIG} {long}")
    if json_fault(path):
        return
    within: list[Any] = [json.loads(path.read_bytes())]
    while within:
        value = within.pop()
        for key, each in value.items() if isinstance(value, dict) else ():
            if isinstance(each, (int, float)) and (most := _most(key)) and each > most:
                raise InputError(
                    f"--{role} {name}: its config.json has {readable(key)} {shown(each)}, expected at most {most}"
                )
        within += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _most(key: str) -> int:
    """The largest number that a model has of what it counts; 0: of a key that counts nothing of the kind."""
    if key in OF_LAYERS:
        return LAYERS
    return LABELS if key == "num_labels" else EXPERTS if "experts" in key else 0


def check_config(role: str, name: str, about: Any) -> None:
    """Raises InputError for a configuration with a key that stands where transformers has a function, with a
    text_config that is none, of no layers or of more layers or experts than a model has: each is a module that would be
    made."""
    from transformers import PretrainedConfig

    try:
        text = about.get_text_config()
    except Exception as error:  # of several texts
        raise InputError(f"--{role} {name}: its config.json cannot be used: {readable(first_line(error))}") from error
    if not isinstance(text, PretrainedConfig):
        raise InputError(f"--{role} {name}: its config.json has as its text_config {shown(text)}, which describes none")
    for settings in (about, text):
        _check_keys(role, name, settings)
        for key, count in vars(settings).items():
            is_layers = key in OF_LAYERS
            if type(count) is not int or not (most := _most(key)):
                continue
            least = 1 if is_layers else -1
            if not least <= count <= most:
                raise InputError(
                    f"--{role} {name}: its config.json has {key} {shown(count)}, expected {max(least, 0)} to {most}"
                )


def _check_keys(role: str, name: str, settings: Any) -> None:
    """transformers makes an attribute of every key."""
    for key, value in vars(settings).items():
        ours = inspect.getattr_static(type(settings), key, None)
        if isinstance(ours, (FunctionType, classmethod, staticmethod)) and not callable(value):
            raise InputError(
                f"--{role} {name}: its config.json has {shown(key)}, the name of a function of transformers' own"
            )


def is_quantised(about: Any) -> bool:
    """Whether transformers knows how the weights of such a model are packed; an unknown way it passes over."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    settings = getattr(about, "quantization_config", None)
    settings = settings if isinstance(settings, Mapping) else vars(settings) if settings is not None else {}
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return True  # bitsandbytes, whose older files name no method
    method = settings.get("quant_method")
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
    described = _described(about, trusted)
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


def _described(about: Any, trusted: bool) -> dict[str, torch.Tensor]:
    """The tensors of a model of this configuration, as shapes alone; none where it cannot be made, which is said where
    it is read."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):  # no shape depends on the attention, which may be of a package that is not here
            model = AutoModelForCausalLM.from_config(about, trust_remote_code=trusted, attn_implementation="eager")
    except Exception:  # of a library that makes what anybody describes
        return {}
    model.tie_weights()
    tensors: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    return tensors


def _once(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Without those that are another one under a second name."""
    return list({id(tensor): tensor for tensor in tensors.values()}.values())


def check_tokenizer(role: str, name: str, tokenizer: Any) -> None:
    """Raises InputError for a tokenizer that can read and write no text at all. One of a closed vocabulary, without a
    token for what is unknown, may know few."""
    try:
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise InputError(f"model_max_length is {shown(tokenizer.model_max_length)}, expected a number")
        faults = []
        words = (word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens)
        for text in (*PROBES, *islice(words, WORDS)):
            try:
                decoded(tokenizer, encoded(tokenizer, text))
                encoded(tokenizer, text, add_special_tokens=False)
                return
            except InputError as error:
                faults.append(error)
        raise faults[0]
    except InputError as error:
        raise InputError(f"--{role} {name}: its tokenizer cannot be used: {error}") from error


def make_savable(role: str, name: str, settings: Any) -> list[str]:
    """Takes from a model's settings of `generate` those that transformers would refuse to write, and says which: such
    as a temperature beside no `do_sample`, which it reads. Settings that can be written stay as they are.

    To be called when nothing else changes them: what was only read is written with fewer questions. Raises InputError
    where nothing helps; it would be after the training.
    """
    fault = _unwritable(settings)
    if not fault:
        return []
    plain, given = type(settings)(), dict(vars(settings))
    own = [
        key
        for key, value in given.items()
        if key in vars(plain) and value != getattr(plain, key) and not key.startswith("_") and key not in KEPT
    ]

    def writable_without(keys: list[str]) -> bool:
        for key in own:
            setattr(settings, key, getattr(plain, key) if key in keys else given[key])
        return not _unwritable(settings)

    left_out = own
    if not writable_without(own):
        raise InputError(
            f"--{role} {name}: its generation_config.json cannot be saved with the student: {shown(fault)}"
        )
    for key in own:  # what is not at fault comes back
        fewer = [each for each in left_out if each != key]
        if writable_without(fewer):
            left_out = fewer
    writable_without(left_out)
    return left_out


def make_config_savable(role: str, name: str, about: Any) -> list[str]:
    """Takes `output_attentions` from a loaded model's configuration where transformers would refuse to write it beside
    the attention that computes, and says so. Nothing reads what it asks for.

    Raises InputError for what cannot be written: it would be after the training.
    """
    fault = _unwritable(about)
    if not fault:
        return []
    if about.output_attentions:
        for settings in (about, about.get_text_config()):
            settings.output_attentions = False
        if not _unwritable(about):
            return ["output_attentions"]
    raise InputError(f"--{role} {name}: its config.json cannot be saved with the student: {shown(fault)}")


def _unwritable(settings: Any) -> str:
    """Why transformers refuses to write a configuration, or settings of `generate`; "" where it does not."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            copy.deepcopy(settings).save_pretrained(folder)  # which may change what it writes
        except Exception as error:  # TypeError for what has no order
            lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
            return lines[1] if len(lines) > 1 and lines[0].endswith(":") else first_line(error)
    return ""
