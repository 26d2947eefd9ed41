"""Whether a server has the weights that it was given: its log-probabilities of a few tokens beside the trainer's.

A transfer that was answered with success may still have changed nothing: a head that is tied, a cache, a folder of
another machine's. The tokens are some prompts' and, behind each, a few that the server sampled once: those are compared
as it reported them too, so that its temperature, top-k and top-p are seen as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast.errors import InputError, shown

from .. import drawn
from ..causal_lm import CausalLM
from ..rollout import Sampling
from ..settings.config import TrainConfig
from . import answers
from .client import Client
from .weights import dtype_name

PROMPTS, PROMPT_TOKENS, SAMPLED = 4, 64, 8  # of each sequence
REMEMBERED = 8  # steps
MORE = 10.0  # times the difference of the beginning: it grows as a policy becomes sure


class Tolerance(NamedTuple):
    """How far a server's log-probabilities may be from the trainer's, in nats, in the mean: ``largest`` at first, and
    what the first comparison says from then on, but for what is ``given``."""

    largest: float
    least: float
    given: bool

    @classmethod
    def of(cls, config: TrainConfig) -> Tolerance:
        """As the configuration says, or by the dtype that servers compute in."""
        if config.rollout_tolerance:
            return cls(config.rollout_tolerance, 0.0, True)
        return cls(0.02, 1e-4, False) if dtype_name(config) == "float32" else cls(0.2, 0.02, False)


@dataclass
class Probe:
    """The tokens, and what the trainer's weights of the last steps made of them: means over the tokens are in nats."""

    sequences: list[list[int]]
    sampled: int  # tokens behind each
    drawn: list[answers.Drawn] = field(default_factory=list)
    before: dict[int, Tensor] = field(default_factory=dict)
    noise: float | None = None  # the mean difference of weights that were there from the beginning

    @classmethod
    def of(cls, prompts: list[list[int]], longest: int, max_new_tokens: int) -> Probe:
        """The beginnings of some prompts, with room for what is sampled and a token more in ``longest`` tokens."""
        sampled = max(1, min(SAMPLED, max_new_tokens, longest - 2))
        kept = max(1, min(PROMPT_TOKENS, longest - 1 - sampled))
        return cls([ids[:kept] for ids in prompts[:PROMPTS]], sampled)

    def extend(self, servers: Sequence[tuple[Client, str]], sampling: Sampling) -> None:
        """Puts a few tokens behind each prompt, which the servers sample in turn: each does so, if there are more of
        them the prompts begin again. ``servers`` with what each calls the model."""
        short = replace(sampling, max_new_tokens=self.sampled)
        begun = self.sequences * -(-len(servers) // len(self.sequences))
        self.sequences = []
        for ids, (client, model) in zip(begun, itertools.cycle(servers), strict=False):
            answer = client.post("v1/completions", answers.request(model, ids, 1, 0, short))
            self.drawn += answers.completions(answer, ids, 1, short, client.name)
            self.sequences.append([*ids, *self.drawn[-1].tokens])

    def asked(self, client: Client, model: str) -> Tensor:
        """A server's log-probabilities of all tokens but the first of each sequence, one after another."""
        whose, values = client.name, list[float]()
        for ids in self.sequences:
            body = {"model": model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0.0}
            answer = client.post("v1/completions", body)
            try:
                of_tokens = answer["choices"][0]["prompt_logprobs"][1:]
                row = [each[str(token)]["logprob"] for each, token in zip(of_tokens, ids[1:], strict=True)]
            except (TypeError, KeyError, IndexError, ValueError) as error:
                raise InputError(f"{whose} answered without the prompt's logprobs: {shown(answer)}") from error
            values += drawn.logprobs(row, len(row), whose)
        return torch.tensor(values)

    def compare(self, asked: Tensor, ours: Tensor, step: int, tolerance: Tolerance, whose: str) -> None:
        """Raises InputError unless a server's log-probabilities are those of the weights of this step."""
        expected = tolerance.largest
        if not tolerance.given and self.noise is not None:
            expected = min(expected, max(MORE * self.noise, tolerance.least))
        apart = {each: _apart(asked, values) for each, values in {**self.before, step: ours}.items()}
        nearest = min(apart, key=lambda each: (apart[each], each != step))
        stale = nearest != step and apart[nearest] < apart[step] / 2
        if stale or not apart[step] <= expected:  # not NaN
            has = f"those of step {nearest}" if stale else "those of no step that is remembered"
            raise InputError(
                f"{whose} has other weights than it was given after step {step}: {has}. Its log-probabilities of "
                f"{len(ours)} fixed tokens differ by {apart[step]:.3g} nats in the mean from the student's"
                + (f", and by {apart[nearest]:.3g} from those of step {nearest}" if stale else "")
                + f"; expected at most {expected:.2g} (--rollout-tolerance)"
            )
        self.noise = apart[step] if self.noise is None else self.noise

    def compare_drawn(self, ours: Tensor, tolerance: float, whose: Sequence[str]) -> None:
        """Raises InputError unless the log-probabilities that came with the tokens that each server sampled are those
        at the temperature."""
        rows = ours.split([len(each.tokens) for each in self.drawn])
        for i, name in enumerate(whose):
            reported = torch.tensor([value for each in self.drawn[i :: len(whose)] for value in each.logprobs])
            if not (apart := _apart(reported, torch.cat(rows[i :: len(whose)]))) <= tolerance:
                raise InputError(
                    f"{name} reports log-probabilities that are not those it samples with: they differ by {apart:.3g} "
                    f"nats in the mean from the trainer's, expected at most {tolerance:g}; start it with "
                    "--logprobs-mode processed_logprobs"
                )

    def remember(self, step: int, ours: Tensor) -> None:
        """Keeps what the weights of a step make of the tokens."""
        self.before[step] = ours
        for old in sorted(self.before)[:-REMEMBERED]:
            del self.before[old]

    @torch.no_grad()
    def scored(self, model: CausalLM, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """(the trainer's log-probabilities of all tokens but the first of each sequence, those of the sampled tokens as
        they are sampled), on the CPU. Every process calls the model alike."""
        width = max(map(len, self.sequences))
        ids = torch.tensor([[*each, *[0] * (width - len(each))] for each in self.sequences], device=model.device)
        lengths = torch.tensor([len(each) for each in self.sequences], device=model.device)
        mask = (torch.arange(width, device=model.device) < lengths[:, None]).long()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        plain = cf.token_stats(logits, logits, ids[:, 1:]).logprob.cpu()
        rows = [
            (len(each), len(each) - len(some.tokens)) for each, some in zip(self.sequences, self.drawn, strict=True)
        ]
        of_sampled = torch.cat([logits[i, begin - 1 : end - 1] for i, (end, begin) in enumerate(rows)]).float()
        of_sampled[:, list(sampling.suppress)] = -torch.inf
        tokens = torch.cat([ids[i, begin:end] for i, (end, begin) in enumerate(rows)])
        sampled = _kept(of_sampled / (sampling.temperature or 1.0), sampling).log_softmax(-1)
        return (
            torch.cat([plain[i, : end - 1] for i, (end, _) in enumerate(rows)]),
            sampled.gather(-1, tokens[:, None])[:, 0].cpu(),
        )


def _kept(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [N, V] of which top-k and top-p leave some, the others -inf."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    ids = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)  # which neither reads
    if sampling.top_k:
        logits = TopKLogitsWarper(sampling.top_k)(ids, logits)
    return TopPLogitsWarper(sampling.top_p)(ids, logits) if sampling.top_p < 1.0 else logits


def _apart(one: Tensor, other: Tensor) -> float:
    """The mean difference of a server's log-probabilities from the trainer's, where the trainer keeps the token: the
    last one that top-p keeps is a question of rounding."""
    kept = other != -torch.inf
    return float((one - other)[kept].abs().mean())
