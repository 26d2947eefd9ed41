"""TRL's GRPO with a budget, and vLLM in its process (`vllm_mode="colocate"`), on a CPU: three steps of a tiny pair.

    python trl_on_vllm.py STUDENT TEACHER FOLDER

Runs in an environment that has both (`test_vllm_alone.py` makes one) and prints the logs as a line of JSON. The way of
the weights is replaced, and nothing else: TRL hands them to the model inside vLLM, whose layers on a CPU have packed
theirs and take no others (vLLM 0.32, model_executor/layers/linear.py, line 1341: no `weight_loader`). Here they go
through a folder, as in `cmdp-fast train`.
"""

from __future__ import annotations

import json
import sys


def main(student: str, teacher: str, folder: str) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cmdp_fast.integrations.trl import CMDPGRPOConfig, CMDPGRPOTrainer

    trainer = CMDPGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher),
        reward_funcs=lambda completions, **_: [float(len({*text})) for text in completions],
        processing_class=AutoTokenizer.from_pretrained(student),
        train_dataset=Dataset.from_list([{"prompt": f"{i}+{9 - i}="} for i in range(8)]),
        args=CMDPGRPOConfig(
            f"{folder}/out",
            budget=2.0,
            scale_rewards="none",
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=64,
            num_generations=4,
            per_device_train_batch_size=4,
            max_completion_length=6,
            max_steps=3,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        ),
    )
    engine = trainer.vllm_generation.llm

    def hand_over() -> None:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(f"{folder}/weights")
        engine.collective_rpc("reload_weights", kwargs={"weights_path": f"{folder}/weights"})
        engine.reset_prefix_cache()

    trainer.vllm_generation.sync_weights = hand_over
    trainer.train()
    print(json.dumps(trainer.state.log_history))


if __name__ == "__main__":  # vLLM starts processes that import this module again
    main(*sys.argv[1:])
