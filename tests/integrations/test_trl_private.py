"""What of TRL is used without being promised: if a release moves it, these tests say which part moved."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("trl", reason="needs the extra `trl`")

import trl
from trl import DistillationTrainer, GRPOTrainer
from trl.models import utils as models
from trl.scripts import grpo as script
from trl.trainer import utils
from trl_pair import distillation, grpo

# Owner, name, parameters: what is overridden or called.
METHODS = [
    (GRPOTrainer, "_calculate_rewards", "self inputs prompts completions completion_ids_list"),
    (GRPOTrainer, "_generate_and_score_completions", "self inputs"),
    (GRPOTrainer, "_compute_loss", "self model inputs"),
    (GRPOTrainer, "compute_loss", "self model inputs return_outputs num_items_in_batch"),
    (DistillationTrainer, "_generate_and_score_completions", "self inputs"),
    (DistillationTrainer, "_compute_loss", "self unwrapped_student inputs num_items_in_batch"),
    (DistillationTrainer, "compute_loss", "self model inputs return_outputs num_items_in_batch"),
    (DistillationTrainer, "_get_train_sampler", "self dataset"),
    (utils, "create_model_from_path", "model_id architecture kwargs"),
    (utils.RepeatSampler, "__init__", "self data_source mini_repeat_count batch_size repeat_count shuffle seed"),
    (models, "prepare_deepspeed", "model accelerator"),
    (models, "prepare_fsdp", "model accelerator"),
]
# Owner, method, text in its source: what is not in a signature.
PROTOCOLS = [
    (GRPOTrainer, "_get_per_token_logps_and_entropies", "model(**model_inputs, labels=labels, fused_lm_head=True)"),
    (GRPOTrainer, "_get_per_token_logps_and_entropies", "outputs.log_probs[:, -logits_to_keep:]"),
    (GRPOTrainer, "_get_per_token_logps_and_entropies", "outputs.entropy[:, -logits_to_keep:]"),
    (GRPOTrainer, "_compute_loss", "if advantages.dim() == 1:"),
    (
        GRPOTrainer,
        "_generate_and_score_completions",
        'self._logs["advantages"].extend(all_process_advantages.tolist())',
    ),
    (GRPOTrainer, "_generate_and_score_completions", 'output["importance_sampling_ratio"] = vllm'),
    (GRPOTrainer, "_generate_and_score_completions", 'output["sampling_per_token_logps"] = sampling'),
    (GRPOTrainer, "_compute_loss", 'per_token_loss = per_token_loss * inputs["importance_sampling_ratio"]'),
    (DistillationTrainer, "compute_loss", "loss, entropy_sum, num_valid_tokens = self._forward_redirection("),
]
ATTRIBUTES = [
    *("_is_vlm", "_tokenizer", "_metrics", "_logs", "generation_config", "generation_kwargs", "use_vllm"),
    *("temperature", "is_deepspeed_enabled", "is_fsdp_enabled"),
]
OF_GRPO = [
    *("aux_loss_enabled", "loss_type", "num_generations", "num_generations_eval", "reward_weights"),
    "max_completion_length",
]
OF_DISTILLATION = ["beta", "shuffle_dataset", "processing_class"]


def moved(methods, protocols) -> list[str]:
    """What is not as it was, a line each."""
    found = []
    for owner, name, expected in methods:
        where = f"{owner.__name__}.{name}"
        method = getattr(owner, name, None)
        if method is None:
            found.append(f"{where} is gone")
            continue
        parameters = " ".join(inspect.signature(method).parameters)
        if parameters != expected:
            found.append(f"{where} takes ({parameters}), expected ({expected})")
    for owner, name, text in protocols:
        method = getattr(owner, name, None)
        if method is None or text not in inspect.getsource(inspect.unwrap(method)):
            found.append(f"{owner.__name__}.{name} no longer has {text!r}")
    return found


def test_trls_private_methods_are_where_they_were():
    found = moved(METHODS, PROTOCOLS)
    assert not found, f"TRL {trl.__version__} has moved what cmdp_fast.integrations.trl overrides:\n" + "\n".join(found)


def test_trls_private_attributes_are_where_they_were(pair, tmp_path):
    for trainer, names in (
        (grpo(pair, tmp_path), ATTRIBUTES + OF_GRPO),
        (distillation(pair, tmp_path), ATTRIBUTES + OF_DISTILLATION),
    ):
        gone = [name for name in names if not hasattr(trainer, name)]
        assert not gone, f"TRL {trl.__version__}: {type(trainer).__mro__[1].__name__} has no {', '.join(gone)}"
    assert script.GRPOScriptArguments.__dataclass_fields__.keys() >= {"reward_funcs", "reward_model_name_or_path"}


def test_what_moved_is_named():
    class Trainer:
        def _compute_loss(self, model, batch):
            return batch

    expected = [(Trainer, "_compute_loss", "self model inputs"), (Trainer, "_prepare", "self")]
    assert moved(expected, [(Trainer, "_compute_loss", "advantages")]) == [
        "Trainer._compute_loss takes (self model batch), expected (self model inputs)",
        "Trainer._prepare is gone",
        "Trainer._compute_loss no longer has 'advantages'",
    ]
