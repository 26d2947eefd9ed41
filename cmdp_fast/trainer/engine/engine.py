"""Completions from vLLM: what a collector asks in place of `generate`.

Prompts and completions go as token ids; nothing is tokenised twice. The main process starts the server, or knows the
servers that run elsewhere, and brings each step's weights there; every process asks for completions of its own prompts.
The server's log-probabilities come with them, for the correction of what is learned from tokens that are not quite the
student's own (`cmdp_fast.sampler_correction`).
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cmdp_fast.errors import InputError
from cmdp_fast.files import writing
from cmdp_fast.http_client import CONCURRENT
from cmdp_fast.threads import begin, results
from cmdp_fast.vocabulary import common_vocabulary

from ..distributed import together, whole_student
from ..records.report import Report
from ..rollout import Rollout, Sampling, assemble
from ..settings.config import TrainConfig
from . import answers
from .client import Client, client_of, served_model, version_of
from .probe import Probe, Tolerance
from .server import Server
from .weights import Weights, dtype_name

if TYPE_CHECKING:
    from accelerate import Accelerator

Pending = tuple[list[list[int]], "Future[list[answers.Drawn]]"]


class Engine:
    """The servers of a model, started when they are first asked. A context: they end with it.

    ``role`` is student or teacher, ``urls`` are servers that run elsewhere, ``longest`` is the number of tokens that a
    prompt and its completion take at most, ``prompts`` are some to compare servers and trainer on.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        report: Report,
        *,
        role: str,
        urls: Sequence[str],
        weights: Weights,
        tokenizer: Any,
        prompts: list[list[int]],
        longest: int,
    ) -> None:
        self.config, self.accelerator, self.report = config, accelerator, report
        self.role, self.urls, self.weights, self.tokenizer = role, list(urls), weights, tokenizer
        self.longest = longest
        self._probe = Probe.of(prompts, longest, config.max_new_tokens)
        self._clients: list[Client] = []
        self._names: list[str] = []  # of the model, at each
        self._step: int | None = None  # whose weights the servers have
        self._server: Server | None = None
        self._folder: Path | None = None
        self._pending: Pending | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(keep_log=kind is not None and issubclass(kind, Exception))

    def close(self, keep_log: bool = False) -> None:
        """Ends the server and removes its files; the log may stay. It is started again if it is asked again."""
        if self._server is not None:
            self._server.close()
        self._pending = None
        if self._folder is not None and self._folder.is_dir():
            for path in self._folder.iterdir():
                if not (keep_log and path.suffix == ".log"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not any(self._folder.iterdir()):
                self._folder.rmdir()
        self._server, self._folder, self._step, self._clients = None, None, None, []

    # ------------------------------------------------------------------------------------- sample

    def sample(
        self,
        policy: nn.Module,
        prompts: list[list[int]],
        sampling: Sampling,
        step: int,
        upcoming: list[list[int]] | None = None,
    ) -> Rollout:
        """A completion of each prompt by the policy with its weights after so many steps, with log-probabilities.

        ``upcoming``: the prompts of the next step, which are begun with these weights; then these prompts' completions
        are those that were begun a step ago, if they were. Every process must call this. Raises InputError.
        """
        columns = common_vocabulary(self.accelerator.unwrap_model(policy))  # servers refuse a word on any other
        sampling = replace(sampling, suppress=tuple(token for token in sampling.suppress if token < columns))
        drawn: list[answers.Drawn] | None = None
        if self._pending is not None:
            theirs, future = self._pending
            with together(self.accelerator):
                begun = future.result()  # before other weights come
            if upcoming is not None:
                self._pending = None
                drawn = begun if theirs == prompts else None
        if drawn is None or upcoming:
            self._bring(policy, sampling, step)
        if drawn is None:
            seeds = _seeds(prompts)
            with together(self.accelerator):
                drawn = self._ask(prompts, seeds, sampling)
        if upcoming:
            self._pending = upcoming, begin([partial(self._ask, upcoming, _seeds(upcoming), sampling)])[0]
        tokens, logprobs = [each.tokens for each in drawn], [each.logprobs for each in drawn]
        return assemble(prompts, tokens, sampling, self.accelerator.device, logprobs)

    def _ask(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[answers.Drawn]:
        """Completions of prompts, equal neighbours in one request; of several servers each gets every so manieth, over
        all processes."""
        groups = list(_groups(prompts, 1 if sampling.temperature == 0 else len(prompts)))
        first = self.accelerator.process_index * len(groups)
        shares = [i % len(self._clients) for i in range(first, first + len(groups))]

        def one(share: int, prompt: list[int], count: int, seed: int) -> list[answers.Drawn]:
            client = self._clients[share]
            body = answers.request(self._names[share], prompt, count, seed, sampling)
            return answers.completions(client.post("v1/completions", body), prompt, count, sampling, client.name)

        asked = zip(shares, groups, seeds, strict=False)
        parts = results(begin([partial(one, share, *group, seed) for share, group, seed in asked], CONCURRENT))
        for share, client in enumerate(self._clients):
            some = [each for own, part in zip(shares, parts, strict=True) if own == share for each in part]
            if some:
                answers.check_texts(some, sampling, client.name)
        return list(itertools.chain.from_iterable(parts))

    # ------------------------------------------------------------------------------------- weights

    def _bring(self, policy: nn.Module, sampling: Sampling, step: int) -> None:
        """Has the servers take the policy's weights, if they have others, and sees to it that they did."""
        if self._step is not None and (self._step == step or not self.weights.changes):
            return
        model, state = whole_student(policy, self.accelerator) if self.weights.changes else (policy, None)
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                self._serve(model, state)
        self._know_servers()
        self._check(policy, sampling, step)
        self._step = step

    def _serve(self, model: Any, state: dict[str, torch.Tensor] | None) -> None:
        """In the main process: writes the weights, and starts a server with them or has the servers take them."""
        folder = self._folder = self._folder or self._make_folder()
        written = self.weights.write(model, state, folder)
        begins = not self._clients
        if begins:
            self._find_servers(written)
        if not (begins and self._server is not None and self.weights.begun_with):
            loads = [partial(self._load, client, written) for client in self._clients]
            results(begin(loads, CONCURRENT if self.weights.at_once else 1))
        for old in folder.glob("adapter-*"):
            if old != written:
                shutil.rmtree(old, ignore_errors=True)

    def _load(self, client: Client, written: Path) -> None:
        client.check()
        self.weights.load(client, written)

    def _make_folder(self) -> Path:
        where = self.config.rollout_folder or None
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"cmdp-fast-{self.role}-", dir=where))
        except OSError as error:
            raise InputError(f"--rollout-folder {where}: {error.strerror}") from error
        if where:
            folder.chmod(0o755)  # a server elsewhere may be another user's
        return folder

    def _find_servers(self, written: Path) -> None:
        if self.urls:
            self._clients = [client_of(url, self.config) for url in self.urls]
            return
        assert self._folder is not None
        tokenizer = self._folder / "tokenizer"
        with writing(tokenizer):
            self.tokenizer.save_pretrained(tokenizer)
        log = self._folder / "vllm.log"
        c, on_cpu = self.config, self.accelerator.device.type == "cpu"
        options = [
            *self.weights.options(written),
            *("--served-model-name", "model", "--tokenizer", str(tokenizer), "--dtype", dtype_name(c)),
            *("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"),
            *("--max-model-len", str(self.longest), "--disable-uvicorn-access-log"),
            *(["--trust-remote-code"] if c.trust_remote_code else []),
            *(["--enforce-eager"] if on_cpu else []),
        ]
        self.report.say(f"starting vLLM for the {self.role}; its log: {log}")
        since = time.monotonic()
        self._server = Server(c, options, log, on_cpu)
        client = client_of(self._server.url, c, self._server.gone)
        with self.report.waiting(f"vLLM starts for the {self.role}", c.rollout_timeout):
            self._server.wait(client, c.rollout_timeout)
        self._clients = [client]
        took = time.monotonic() - since
        self.report.say(
            f"vLLM {version_of(client)} serves the {self.role} in {dtype_name(c)} (started in {took:.0f} s)"
        )

    def _know_servers(self) -> None:
        """Has every process know the servers that the main process knows, and what each calls the model."""
        from accelerate.utils import broadcast_object_list

        with together(self.accelerator):
            if self.accelerator.is_main_process:
                served = [served_model(client, self.longest) for client in self._clients]
                self._names = [self.weights.name(each) for each in served]
        known = broadcast_object_list([[client.url for client in self._clients], self._names])
        if not self.accelerator.is_main_process:
            self._clients, self._names = [client_of(url, self.config) for url in known[0]], known[1]

    def _check(self, policy: nn.Module, sampling: Sampling, step: int) -> None:
        """Raises InputError unless every server has the policy's weights; see `probe.py`."""
        from accelerate.utils import broadcast_object_list

        probe, asked = self._probe, list[torch.Tensor]()
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                servers = list(zip(self._clients, self._names, strict=True))
                if not probe.drawn:
                    probe.extend(servers, sampling)
                asked = results(begin([partial(probe.asked, *each) for each in servers], CONCURRENT))
        probe.sequences, probe.drawn = broadcast_object_list([probe.sequences, probe.drawn])
        with self.accelerator.autocast():
            ours, sampled = probe.scored(self.accelerator.unwrap_model(policy), sampling)
        tolerance = Tolerance.of(self.config)
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                for client, theirs in zip(self._clients, asked, strict=True):
                    probe.compare(theirs, ours, step, tolerance, client.name)
                if self._step is None and sampling.temperature:
                    probe.compare_drawn(sampled, tolerance.largest, [client.name for client in self._clients])
        probe.remember(step, ours)


def _groups(prompts: list[list[int]], most: int) -> Iterator[tuple[list[int], int]]:
    """Equal neighbours as one, with their number, up to ``most``."""
    for ids, equal in itertools.groupby(prompts):
        count = sum(1 for _ in equal)
        for start in range(0, count, most):
            yield ids, min(most, count - start)


def _seeds(prompts: Sequence[object]) -> list[int]:
    """A seed for each prompt, from the process's random numbers; far apart, for a server counts on from each."""
    return torch.randint(2**47, (len(prompts),)).tolist()
