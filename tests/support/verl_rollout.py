"""verl's rollout interface with transformers' `generate` behind it: samples for the student, scores for the teacher.

It takes the name of vLLM in verl's registries: the teacher's configuration, verl/workers/config/distillation.py,
refuses any name but this and sglang.
"""

from __future__ import annotations

import os
from typing import Any

import ray
import torch
from transformers import AutoModelForCausalLM
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput


class Server:
    """A model that answers one request at a time, as `vLLMHttpServer` does with many."""

    def __init__(self, path: str, response_length: int, seed: int) -> None:
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.response_length, self.global_steps = response_length, 0

    def load(self, weights: dict[str, torch.Tensor], global_steps: int | None) -> None:
        self.model.load_state_dict(weights)
        self.global_steps = global_steps

    @torch.no_grad()
    def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **_: Any
    ) -> TokenOutput:
        extra = {"global_steps": self.global_steps}
        if (k := sampling_params.get("prompt_logprobs")) is not None:
            return TokenOutput(token_ids=[], extra_fields=extra | self._scores(prompt_ids, k))
        greedy = sampling_params["temperature"] == 0
        result = self.model.generate(
            torch.tensor([prompt_ids]),
            do_sample=not greedy,
            **({} if greedy else {"temperature": sampling_params["temperature"], "top_k": 0, "top_p": 1.0}),
            max_new_tokens=self.response_length,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = result.sequences[0, len(prompt_ids) :]
        logprob = torch.cat(result.logits).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        return TokenOutput(
            token_ids=tokens.tolist(), log_probs=logprob.tolist(), stop_reason="completed", extra_fields=extra
        )

    def _scores(self, ids: list[int], k: int) -> dict[str, list]:
        """What `extract_prompt_logprobs` of verl makes of vLLM's answer: of each token but the first its k likeliest,
        or for k = 0 itself, and a row that stands for the token after the last. A run that wants to know what its
        teacher read names a file in VERL_RUN_SCORED."""
        if path := os.environ.get("VERL_RUN_SCORED"):
            with open(path, "a") as scored:
                scored.write(f"{ids}\n")
        logprob = self.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        if k:
            values, tokens = logprob.topk(k, -1)
        else:
            tokens = torch.tensor(ids[1:])[:, None]
            values = logprob.gather(-1, tokens)
        width = max(k, 1)
        return {
            "prompt_ids": [*tokens.tolist(), [0] * width],
            "prompt_logprobs": [*values.tolist(), [0.0] * width],
        }

    def rest(self) -> None:
        """Sleeping, waking up and clearing a cache: it keeps nothing on a device."""


def _name(teacher: bool, rank: int) -> str:
    return f"transformers_{'teacher' if teacher else 'student'}_{rank}"


class TransformersReplica(RolloutReplica):
    async def launch_servers(self) -> None:
        server = (
            ray.remote(Server)
            .options(name=_name(self.is_teacher_model, self.replica_rank), num_cpus=0)
            .remote(self.model_config["path"], self.config.response_length, self.config.seed)
        )
        await server.rest.remote()
        self.servers, self._server_handle = [server], server
        self._server_address = _name(self.is_teacher_model, self.replica_rank)

    async def sleep(self) -> None: ...

    async def wake_up(self) -> None: ...

    async def clear_kv_cache(self) -> None: ...


class TransformersAdapter(BaseRollout):
    """What an actor's worker sends its weights through."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in weights}
        await ray.get_actor(_name(False, self.replica_rank)).load.remote(tensors, global_steps)


RolloutReplicaRegistry.register("vllm", lambda: TransformersReplica)
_ROLLOUT_REGISTRY["vllm", "async"] = "verl_rollout.TransformersAdapter"
