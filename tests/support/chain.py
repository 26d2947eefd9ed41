"""A model whose completions are known: after each character the one that a chain names, almost surely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_pair import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def chain_model(folder: Path, chain: dict[str, str], end: str = "", **options: Any) -> str:
    """A folder with a model that follows the chain; its generation settings end at the character ``end`` if one is
    given, its tokenizer's end of sequence is as ever."""
    tiny_model(folder, seed=1, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    now, after = (tokenizer.convert_tokens_to_ids([*side]) for side in (chain, chain.values()))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()  # what is left is the token's own embedding
        hidden = model.model.norm(model.get_input_embeddings().weight[now])
        wanted = 60.0 * torch.nn.functional.one_hot(torch.tensor(after), model.config.vocab_size).float()
        model.get_output_embeddings().weight.copy_(torch.linalg.lstsq(hidden, wanted).solution.T)
    if end:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(end)
    model.save_pretrained(folder)
    return str(folder)
