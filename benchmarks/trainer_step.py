"""Memory and time of a trainer's scoring and update passes, with logits by the tile and in full.

    python benchmarks/trainer_step.py [--completions 16 --length 64 --layers 4]

Student and teacher are Llamas with random weights in SmolLM2-135M's shape (hidden size 576, 49152 tokens) but for their
number of layers; the completions are random tokens, since what is drawn changes neither memory nor time. Each variant
runs in a fresh process. Its extra memory is the growth of the peak resident size (Linux) from before scoring to after
the update, so it holds activations, gradients and Adam's moments too: those are the same for both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from token_stats import peak_kib, reset_peak
from transformers import LlamaConfig, LlamaForCausalLM

from cmdp_fast.trainer.config import TrainConfig
from cmdp_fast.trainer.experience import Collector, Completions
from cmdp_fast.trainer.ppo import PPO
from cmdp_fast.trainer.rollout import Rollout, Sampling

VOCABULARY = 49152


def make_model(seed: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=VOCABULARY, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def make_rollout(completions: int, length: int) -> Rollout:
    tokens = torch.randint(0, VOCABULARY, (completions, length))
    prompt = torch.randint(0, VOCABULARY, (completions, 16))
    whole = torch.ones(completions, dtype=torch.bool)
    return Rollout(prompt, torch.ones_like(prompt, dtype=torch.bool), tokens, torch.ones_like(tokens) > 0, whole)


def step(ppo: PPO, rollout: Rollout) -> dict[str, float]:
    """Scores and updates; the seconds of each, and the loss."""
    start, constraint = time.perf_counter(), ppo.constraint()
    completions = Completions(rollout, [], torch.ones(len(rollout)), {})
    experience = ppo.collector.score(completions, ppo.student, constraint, ppo.clock, keep_outputs=True)
    scored = time.perf_counter()
    metrics = ppo.update(experience, ppo.targets(experience, constraint))
    return {"scoring": scored - start, "update": time.perf_counter() - scored, "loss": metrics["loss"]}


def child(logits: str, completions: int, length: int, layers: int) -> None:
    """Runs one variant in this fresh process and prints what it took."""
    student, teacher = make_model(0, layers), make_model(1, layers).requires_grad_(False)
    config = TrainConfig(logits=logits, epochs=1, minibatch_size=completions, micro_batch_size=completions, budget=1.0)
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    collector = Collector(
        config,
        accelerator=accelerator,
        student=student,
        teacher=teacher,
        tokenizer=None,
        sampling=Sampling(max_new_tokens=length, temperature=1.0, eos=(0,), pad=0),
        vocab_size=VOCABULARY,
        rewards={},
    )
    scheduler = SimpleNamespace(get_last_lr=lambda: [0.0], step=lambda: None)
    ppo = PPO(collector, optimizer=accelerator.prepare(optimizer), scheduler=scheduler)
    before = reset_peak()
    torch.manual_seed(2)
    took = step(ppo, make_rollout(completions, length))
    print(json.dumps(took | {"mib": (peak_kib() - before) / 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--child", choices=("tiled", "full"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = (args.completions, args.length, args.layers)
    if args.child:
        child(args.child, *sizes)
        return
    print(
        f"{args.completions} completions of {args.length} tokens, {args.layers} layers, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for logits in ("full", "tiled"):
        command = [sys.executable, __file__, "--child", logits]
        for name, value in zip(("--completions", "--length", "--layers"), sizes, strict=True):
            command += [name, str(value)]
        took = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"  logits {logits:6} extra memory {took['mib']:8.1f} MiB   scoring {took['scoring']:6.2f} s   "
            f"update {took['update']:6.2f} s   loss {took['loss']:.5f}"
        )


if __name__ == "__main__":
    main()
