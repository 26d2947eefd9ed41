"""vLLM as TRL sees it, server and engine, with a model of transformers' behind: no vLLM is needed.

TRL's own code for both modes runs: it hands over the weights before it samples, asks for the log-probability of each
token, and takes completions as vLLM returns them. The sampler is the student in "another precision": its logits are
scaled.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

SCALE = 0.7
"""Of the logits: the sampler's distribution is flatter than the student's."""


class Sampler:
    """A model that samples, and how often it got weights."""

    def __init__(self, folder: str, scale: float = SCALE) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.scale, self.loads, self.loaded = scale, 0, set[str]()

    def load(self, name: str, weight: torch.Tensor) -> None:
        self.loads += 1
        self.loaded.add(name)
        with torch.no_grad():
            self.model.get_parameter(name).copy_(weight)

    @torch.no_grad()
    def draw(self, prompt: list[int], max_tokens: int, temperature: float) -> tuple[list[int], list[float]]:
        """(tokens, the log-probability of each under what it was drawn from)."""
        ids, logprobs = list(prompt), []
        while len(logprobs) < max_tokens:
            logits = self.model(torch.tensor([ids])).logits[0, -1] * self.scale / temperature
            row = logits.log_softmax(-1)
            token = int(torch.multinomial(row.exp(), 1))
            ids.append(token)
            logprobs.append(float(row[token]))
            if token == self.model.config.eos_token_id:
                break
        return ids[len(prompt) :], logprobs


def client(sampler: Sampler) -> type:
    """A class for TRL's `VLLMClient`."""

    class Client:
        def __init__(self, **_: Any) -> None: ...

        def init_communicator(self, device: Any) -> None: ...

        def get_server_info(self) -> dict[str, Any]:
            return {"model_config": {"logprobs_mode": "processed_logprobs"}}

        def update_named_params(self, metadata: Any, parameters: Any) -> None:
            for name, weight in parameters:
                sampler.load(name, weight)

        def reset_prefix_cache(self) -> None: ...

        def generate(self, prompts: Any, n: int, max_tokens: int, temperature: float, **_: Any) -> dict[str, Any]:
            drawn = [sampler.draw(ids, max_tokens, temperature) for ids in prompts for _ in range(n)]
            return {
                "prompt_ids": prompts,
                "completion_ids": [tokens for tokens, _ in drawn],
                "logprobs": [[[value] for value in logprobs] for _, logprobs in drawn],
            }

    return Client


def engine(sampler: Sampler) -> type:
    """A class for vLLM's `LLM`."""

    class Engine:
        def __init__(self, **_: Any) -> None:
            model = SimpleNamespace(load_weights=lambda pairs: [sampler.load(*pair) for pair in pairs])
            runner = SimpleNamespace(model_runner=SimpleNamespace(model=model))
            self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))

        def reset_prefix_cache(self) -> None: ...

        def generate(self, prompts: Any, sampling_params: Any, use_tqdm: bool) -> list[Any]:
            found = []
            for prompt in prompts:
                ids = prompt["prompt_token_ids"]
                tokens, logprobs = sampler.draw(ids, sampling_params.max_tokens, sampling_params.temperature)
                columns = [
                    {token: SimpleNamespace(rank=1, logprob=value)}
                    for token, value in zip(tokens, logprobs, strict=True)
                ]
                output = SimpleNamespace(token_ids=tokens, logprobs=columns)
                found.append(SimpleNamespace(prompt_token_ids=ids, outputs=[output]))
            return found

    return Engine


def stand_in(patch: pytest.MonkeyPatch, folder: str, scale: float = SCALE) -> Sampler:
    """Puts it in vLLM's place, in both modes, until the patch is undone."""
    from trl.generation import vllm_generation

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # TRL sets them for the engine
        patch.setenv(name, "")
        patch.delenv(name)  # as it was, until the patch is undone
    sampler = Sampler(folder, scale)
    patch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    patch.setattr(vllm_generation, "VLLMClient", client(sampler))
    patch.setattr(vllm_generation, "LLM", engine(sampler), raising=False)
    patch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    return sampler
