"""A teacher in this process that reads a prompt once: the completions of a prompt share its keys and values.

What is shared is a row but for the tokens whose outputs are wanted: of a prompt and a completion all but the prompt's
last token. The numbers are those of the row as a whole but for rounding: the same products add up in other shapes.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cmdp_fast.errors import first_line
from cmdp_fast.heads import last_hidden_state

from .in_process import TeacherInProcess


class PrefixCachedTeacher(TeacherInProcess):
    """`TeacherInProcess` with the keys and values of the last prompts, in up to ``most`` bytes on the model's device,
    the last of them in any case; the one that was longest not asked for goes first. The rows of a prompt are a batch.

    Raises TypeError for a model whose keys and values are not plain tensors of all tokens in every layer (sliding
    windows, states of Mamba), and ValueError for one that says something else with them than without.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str = "",
        revision: str = "",
        ends: tuple[int, ...] = (),
        *,
        most: int,
    ) -> None:
        super().__init__(model, tokenizer, name, revision, ends)
        self.read = self.shared = 0  # tokens of prompts: that the model has read, and that it did not have to
        self._most, self._bytes = most, 0
        self._kept: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._check_model()

    def _hidden(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> Tensor:
        groups: dict[tuple[int, ...], list[int]] = {}  # places of the rows that begin alike
        for place, (row, count) in enumerate(zip(rows, wanted, strict=True)):
            if count:
                groups.setdefault(tuple(row[: len(row) - count]), []).append(place)
        parts: dict[int, Tensor] = {}
        for prefix, places in groups.items():
            some, counts = [rows[place] for place in places], [wanted[place] for place in places]
            hidden = self._behind(prefix, some, counts) if prefix else super()._hidden(some, counts)
            parts |= zip(places, hidden.split(counts), strict=True)
        return torch.cat([parts[place] for place in sorted(parts)])

    def _behind(self, prefix: tuple[int, ...], rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> Tensor:
        """The hidden states of what stands behind the prefix of all these rows."""
        size, device = max(wanted), self.model.device
        tokens = [[*row[len(prefix) :], *[row[-1]] * (size - count)] for row, count in zip(rows, wanted, strict=True)]
        kept = copy.deepcopy(self._read(prefix))  # which grows with what is read
        kept.batch_repeat_interleave(len(rows))
        input_ids = torch.tensor(tokens, device=device)
        hidden = last_hidden_state(self.model, input_ids, past_key_values=kept, use_cache=True)
        return torch.cat([row[:count] for row, count in zip(hidden, wanted, strict=True)])

    def _read(self, prefix: tuple[int, ...]) -> Any:
        """The keys and values of a prefix [1, …], read now if they are not there."""
        if (known := self._kept.pop(prefix, None)) is not None:
            self.shared += len(prefix)
        else:
            from transformers import DynamicCache

            known = DynamicCache(config=self.model.config)
            input_ids = torch.tensor([prefix], device=self.model.device)
            last_hidden_state(self.model, input_ids, past_key_values=known, use_cache=True)
            self.read += len(prefix)
            self._bytes += _bytes(known)
        self._kept[prefix] = known  # the last to go
        while self._bytes > self._most and len(self._kept) > 1:
            self._bytes -= _bytes(self._kept.popitem(last=False)[1])
        return known

    def _check_model(self) -> None:
        """Reads a few tokens with and without what is kept: half of the digits have to agree."""
        from transformers.cache_utils import DynamicLayer

        name = type(self.model).__name__
        row = [place % self.about.vocab_size for place in range(8)]
        with torch.no_grad():
            try:
                said = self._hidden([row], [4])
                layers = self._read(tuple(row[:4])).layers
            except Exception as error:  # of models that know no such thing, in their own words
                raise TypeError(
                    f"{name} cannot go on from keys and values that are kept: {first_line(error)}"
                ) from error
            if not layers or not all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers):
                raise TypeError(f"{name} does not keep the keys and values of all tokens in every layer")
            expected = super()._hidden([row], [4]).double()
        off = float((said.double() - expected).norm() / expected.norm())
        if not off <= torch.finfo(said.dtype).eps ** 0.5:
            raise ValueError(f"{name} says something else with a prefix cache: its hidden states are off by {off:.2g}")
        self._kept.clear()
        self.read = self.shared = self._bytes = 0


def _bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
