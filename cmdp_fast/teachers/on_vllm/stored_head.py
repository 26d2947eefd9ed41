"""The head of a model that is elsewhere: its tensors alone out of the model's files, and what its architecture does
with them.

The architecture is observed, as in `heads.py`, on a model without numbers: on the device `meta` a forward pass costs
nothing, whatever the size. Two tensors in it are real. One stands in the place of the final norm's output, and has to
enter the head as it is: then the head reads what that norm gives, which is what vLLM answers with. The other stands in
the place of the head's output, and shows scale and softcap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmdp_fast.checks import LOGIT_DTYPES
from cmdp_fast.errors import InputError, first_line, readable
from cmdp_fast.heads import Head, chosen_logits, postprocessing
from cmdp_fast.vocabulary import named_ends, vocabulary_digest
from cmdp_fast.weight_files import INDEX, ONE, QUIET, read_index


@dataclass(frozen=True)
class Gain:
    """What a norm does to a row of mean square 1 (and mean 0): ``weight`` times it, and ``bias``; [H], float64."""

    weight: Tensor
    bias: Tensor

    def mean_square(self, hidden: Tensor) -> Tensor:
        """Of rows [N, H] that the norm gave, before weight and bias: 1, less what its epsilon takes; [N]."""
        return self._before(hidden, self.bias).square().mean(-1)

    def rounding(self, hidden: Tensor, eps: float) -> Tensor:
        """By how much rows that were rounded to ``eps`` may change `mean_square`; [N]."""
        off = eps * self._before(hidden, torch.zeros_like(self.bias)).abs()
        return (2 * self._before(hidden, self.bias).abs() * off + off.square()).mean(-1)

    def _before(self, hidden: Tensor, bias: Tensor) -> Tensor:
        used = self.weight != 0
        return (hidden.double()[:, used] - bias[used]) / self.weight[used]


class StoredModel:
    """A model in a folder, or with an id on the hub, of which the configuration, the tokenizer and single tensors are
    read. Raises InputError, which names it, for what is not there or cannot be used."""

    def __init__(self, name: str) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.name = name
        self.config = self._loaded(AutoConfig, "configuration")
        self.tokenizer = self._loaded(AutoTokenizer, "tokenizer")
        self.vocabulary = vocabulary_digest(self.tokenizer)
        self.vocab_size = int(self.config.get_text_config().vocab_size)

    def _loaded(self, auto: Any, what: str) -> Any:
        try:
            return auto.from_pretrained(self.name, trust_remote_code=False)
        except Exception as error:  # of libraries that read anybody's files, in whatever form
            raise InputError(
                f"no {what} of the model {readable(self.name)} that the server serves can be read here: "
                f"{readable(first_line(error))}; say where it is: ?model=FOLDER"
            ) from error

    def ends(self) -> tuple[int, ...]:
        """The tokens that end its completions."""
        from transformers import GenerationConfig

        settings = [self.config, self.config.get_text_config()]
        with suppress(OSError):  # not every model has one
            settings.insert(0, GenerationConfig.from_pretrained(self.name))
        return tuple(each for each in named_ends(settings, self.tokenizer) if each < self.vocab_size)

    def revision(self) -> str:
        """The commit on the hub; of a folder a sha256 of the tensors' names and shapes, and of each one's beginning."""
        if commit := getattr(self.config, "_commit_hash", None):
            return str(commit)
        digest = hashlib.sha256()
        for name, file in sorted(self._places().items()):
            with _opened(self.name, self._file(file)) as tensors:
                piece = tensors.get_slice(name)
                shape = piece.get_shape()
                begin = (piece[:1] if shape else tensors.get_tensor(name)).contiguous()
                digest.update(f"{name} {shape} {begin.dtype}".encode())
                digest.update(begin.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def head(self, dtype: torch.dtype) -> tuple[Head, Gain]:
        """The head in a dtype, and what the norm before it does."""
        skeleton = self._skeleton()
        linear = skeleton.get_output_embeddings()
        if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
            raise self._unknown(f"its head is a {type(linear).__name__} and no plain torch.nn.Linear")
        norm_name, norm = self._final_norm(skeleton, linear)
        softcap, scale = self._postprocessing(skeleton, linear, norm)
        own = {name: p for name, p in linear.named_parameters() if p is not None}
        names = {id(p): name for name, p in skeleton.named_parameters()}  # a tied weight has the embedding's name
        prefix = str(getattr(skeleton, "base_model_prefix", ""))
        places = self._places()
        read = {
            name: self._tensor(places, names[id(parameter)], prefix, parameter.shape, dtype)
            for name, parameter in own.items()
        }
        head = Head(read["weight"], read.get("bias"), softcap, scale)
        given = {
            name: self._tensor(places, f"{norm_name}.{name}", prefix, parameter.shape, dtype)
            for name, parameter in norm.named_parameters()
        }
        return head, _gain(norm, given, head.weight.shape[1])

    def _skeleton(self) -> Any:
        """The causal language model of the configuration on the device `meta`."""
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(self.config, trust_remote_code=False).eval()
        except Exception as error:  # the same
            raise self._unknown(
                f"it is no causal language model of transformers: {readable(first_line(error))}"
            ) from error

    def _final_norm(self, skeleton: Any, linear: nn.Linear) -> tuple[str, nn.Module]:
        """The last norm that runs before the head, and its name."""
        ran: list[tuple[str, nn.Module]] = []
        norms = [each for each in skeleton.named_modules() if "norm" in type(each[1]).__name__.lower()]
        hooks = [
            module.register_forward_hook(lambda module, _, __, name=name: ran.append((name, module)))
            for name, module in norms
        ]
        before: list[int] = []
        hooks.append(linear.register_forward_pre_hook(lambda *_: before.append(len(ran))))
        self._run(skeleton, hooks)
        if len(before) != 1 or not before[0]:
            raise self._unknown("it has no norm before its head")
        return ran[before[0] - 1]

    def _postprocessing(self, skeleton: Any, linear: nn.Linear, norm: nn.Module) -> tuple[float | None, float]:
        """(softcap, scale), and that what the norm gives is what the head reads."""
        given = chosen_logits(torch.empty(1, 2, linear.in_features, dtype=linear.weight.dtype))  # any numbers would do
        entered: list[Tensor] = []
        raw = chosen_logits(torch.empty(1, 2, linear.out_features))

        def enter(_: Any, hidden: tuple[Tensor, ...]) -> tuple[Tensor]:
            entered.append(hidden[0])
            return (torch.empty(hidden[0].shape, dtype=linear.weight.dtype, device="meta"),)

        hooks = [
            norm.register_forward_hook(lambda *_: given),
            linear.register_forward_pre_hook(enter),
            linear.register_forward_hook(lambda *_: raw),
        ]
        logits = self._run(skeleton, hooks)
        if len(entered) != 1 or not torch.equal(entered[0], given):
            raise self._unknown("it changes what its last norm gives before its head reads it")
        try:
            return postprocessing(skeleton, raw, logits)
        except ValueError as error:
            raise self._unknown(str(error)) from error

    def _run(self, skeleton: Any, hooks: list[Any]) -> Tensor:
        """The logits of two tokens. A mask that is given whole is not looked into, as there is nothing in it."""
        inputs = {
            "input_ids": torch.zeros(1, 2, dtype=torch.int64, device="meta"),
            "position_ids": torch.zeros(1, 2, dtype=torch.int64, device="meta"),
            "attention_mask": torch.zeros(1, 1, 2, 2, device="meta"),
        }
        try:
            with torch.no_grad():
                logits: Tensor = skeleton(**inputs, use_cache=False).logits
                return logits
        except Exception as error:  # of any architecture's code, run on tensors that it was not written for
            raise self._unknown(f"it could not be run without its numbers: {readable(first_line(error))}") from error
        finally:
            for hook in hooks:
                hook.remove()

    def _unknown(self, why: str) -> InputError:
        return InputError(
            f"the head of {readable(self.name)} is not one that its hidden states on vLLM belong to, or it cannot be "
            f"seen: {why}; ask such a teacher for the log-probabilities of its likeliest tokens: ?k=20"
        )

    def _places(self) -> dict[str, str]:
        """The tensors of the model's files and, of each, its file."""
        from transformers.utils import cached_file

        if file := cached_file(self.name, ONE, **QUIET):  # first of all, as transformers has it
            with _opened(self.name, file) as tensors:
                return dict.fromkeys(tensors.keys(), ONE)
        index = cached_file(self.name, INDEX, **QUIET)
        if not index:
            raise InputError(f"{readable(self.name)} has neither {ONE} nor {INDEX}")
        try:
            return read_index(Path(index))
        except ValueError as error:
            raise InputError(f"{readable(self.name)}: {error}") from error

    def _tensor(
        self, places: Mapping[str, str], name: str, prefix: str, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        """A tensor of the files by its name in the model. The files of a base model leave its prefix out, those of a
        larger model put one in front."""
        stored = next((each for each in (name, name.removeprefix(f"{prefix}.")) if each in places), "")
        if not stored:
            longer = [each for each in places if each.endswith(f".{name}")]
            stored = longer[0] if len(longer) == 1 else ""
        if not stored:
            raise InputError(f"{readable(self.name)} has no tensor {name} among the {len(places)} of its files")
        with _opened(self.name, self._file(places[stored])) as tensors:
            tensor: Tensor = tensors.get_tensor(stored)
        if tensor.shape != shape or tensor.dtype not in LOGIT_DTYPES:
            raise InputError(
                f"{readable(self.name)}: {stored} is {list(tensor.shape)} of {tensor.dtype}, expected {list(shape)} "
                "in floating point"
            )
        return tensor.to(dtype)

    def _file(self, name: str) -> str:
        """The path of one of the files, fetched if it is on the hub."""
        from transformers.utils import cached_file

        try:
            return str(cached_file(self.name, name))
        except OSError as error:
            raise InputError(f"{readable(self.name)}: {readable(name)} is not there: {first_line(error)}") from error


def _gain(norm: nn.Module, given: Mapping[str, Tensor], size: int) -> Gain:
    """What a norm does, shown by what it makes of nothing, and of numbers of mean square 1 and mean 0."""
    norm = norm.to_empty(device="cpu").double()
    norm.load_state_dict({name: value.double() for name, value in given.items()}, strict=False)
    signs = torch.ones(size, dtype=torch.float64)
    signs[1::2] = -1.0
    with torch.no_grad():
        bias = norm(torch.zeros(1, size, dtype=torch.float64))[0].double()
        weight = (norm(signs[None])[0].double() - bias) * signs
    return Gain(weight, bias)


@contextmanager
def _opened(model: str, file: str) -> Iterator[Any]:
    """A file of tensors. An InputError names it if it is damaged, or has not what the index says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise InputError(f"{readable(model)}: {Path(file).name} cannot be read: {first_line(error)}") from error
