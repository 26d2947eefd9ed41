"""Sequences one after another in a row: outputs and gradients are those of each alone; models that mix are found."""

from __future__ import annotations

import pytest
import torch
from completion_batches import batch
from test_unmasked import IN_FLOAT32, result, row_by_row, with_a_mask
from tiny_models import tiny

from cmdp_fast import reading
from cmdp_fast.heads import head_of
from cmdp_fast.packed import packed
from cmdp_fast.positions import packing_mixes

APART = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32},  # learned positions
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"num_local_experts": 4},
}
MIXING = {
    "bloom": {"n_layer": 2, "n_head": 2},  # a bias by distance in the row
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32},  # positions by a mask of its own
    "mamba": {},  # a state
    "lfm2": {"layer_types": ["conv", "full_attention"]},  # reaches two tokens back
}


def test_layout():
    completions = batch((3, 1, 2), (2, 1, 4))
    completions.mask[1] = False
    row = packed(completions)
    real = [
        ids[mask].tolist()
        for pair in zip(
            *(completions.prompt_ids, completions.prompt_mask, completions.tokens, completions.mask), strict=True
        )
        for ids, mask in (pair[:2], pair[2:])
    ]
    # All but the last token of each sequence; one of one token keeps it
    assert row.input_ids.tolist() == [[*real[0], *real[1][:-1], *real[2], *real[4], *real[5][:-1]]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 3, 4]]
    assert row.outputs[completions.mask].tolist() == [2, 3, 6, 7, 8, 9]
    assert row.outputs.min() >= 0 and row.outputs.max() <= 9


@pytest.mark.parametrize("family", APART)
def test_hidden_states_and_gradients_are_those_of_each_row_alone(family):
    model = tiny(family, **APART[family])
    model = model if family == "mixtral" else model.double()  # torch's grouped products have no float64
    eps = torch.finfo(torch.float32 if family in (*IN_FLOAT32, "gemma2", "mixtral") else torch.float64).eps
    for completions in (
        batch(),
        batch((4, 4, 4)),
        batch((2, 7, 3), (1, 1, 1)),
        batch((2,), (5,)),
        batch((1, 1), (1, 1)),
    ):
        mask = completions.mask
        actual, gradients = result(model, reading.completion_hidden(model, completions, padding_free=True), mask)
        expected, others = result(model, row_by_row(model, completions), mask)
        size = float(expected.abs().max())
        assert float((actual - expected).abs().max()) <= 64 * eps * size  # sums of some tens of terms, in another order
        for ours, theirs in zip(gradients, others, strict=True):
            assert float((ours - theirs).abs().max()) <= 1024 * eps * max(size, float(theirs.abs().max()))
        with torch.no_grad():
            logits = reading.completion_logits(model, completions, padding_free=True)[mask]
            others = head_of(model).logits(expected)
        assert float((logits - others).abs().max()) <= 1024 * eps * float(others.abs().max())


def test_batches_that_need_a_mask():
    hole = batch()
    hole.mask[0, 1] = False
    model = tiny("llama")
    for completions in (hole, batch((3, 0, 2))):
        assert packed(completions) is None
        with torch.no_grad():
            outputs = reading.completion_hidden(model, completions, padding_free=True)
            assert torch.equal(outputs, with_a_mask(model, completions))


def mixes(family: str, half: bool, experts: bool, **changes) -> bool:
    """What is found of a model that reads sequences in a row with the positions of `packed`."""
    model = tiny(family, **changes)

    def read(sequences: list[torch.Tensor]) -> list[torch.Tensor]:
        lengths = [ids.shape[1] for ids in sequences]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = model(torch.cat(sequences, 1), position_ids=positions, use_cache=False).logits
        return list(output[0].split(lengths))

    dtypes = [torch.bfloat16] if half else []
    return packing_mixes(read, model, 101, experts=experts, dtypes=dtypes)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("family", [*APART, *MIXING])
def test_models_that_mix_are_found(family, half):
    """By a single bit, as weights that are nearly 0 at the beginning leave hardly more."""
    changes = (APART | MIXING)[family]
    for scale in (0.2, 0.02):
        given = changes | {"initializer_range": scale}
        assert mixes(family, half, experts=family == "mixtral", **given) == (family in MIXING)


def test_a_model_that_counts_on_is_found():
    """It reads other positions than are given, and keeps the sequences apart all the same."""
    model = tiny("gpt2", **APART["gpt2"])

    def read(sequences):
        start, rows = 0, []
        for ids in sequences:
            end = start + ids.shape[1]
            rows.append(model(ids, position_ids=torch.arange(start, end)[None]).logits[0])
            start = end
        return rows

    assert packing_mixes(read, model, 101, experts=False)
