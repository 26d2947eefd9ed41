"""Prompts and completions without an attention mask: the same hidden states and gradients, and no B x W x W numbers."""

from __future__ import annotations

import pytest
import torch
from completion_batches import batch
from tiny_models import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmdp_fast import reading
from cmdp_fast.heads import last_hidden_state
from cmdp_fast.unmasked import unmasked

FAMILIES = {
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32},  # learned positions
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32},  # which are counted from the mask
    "llama": {},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 4},
    "bloom": {"n_layer": 2, "n_head": 2},  # a bias by distance
}
IN_FLOAT32 = ("gemma3_text", "bloom")  # norms, or the softmax, whatever the weights are


def with_a_mask(model, completions) -> torch.Tensor:
    """As in `generate`: padding in front, which the mask leaves out."""
    return reading._last(last_hidden_state(model, **reading._inputs(completions)), completions)


def row_by_row(model, completions) -> torch.Tensor:
    """Each sequence by itself, without padding or mask."""
    rows = []
    for i in range(len(completions.tokens)):
        prompt, tokens = (
            ids[i][mask[i]]
            for ids, mask in (
                (completions.prompt_ids, completions.prompt_mask),
                (completions.tokens, completions.mask),
            )
        )
        hidden = last_hidden_state(model, torch.cat([prompt, tokens[:-1]])[None])[0, len(prompt) - 1 :]
        rows.append(torch.nn.functional.pad(hidden, (0, 0, 0, completions.tokens.shape[1] - len(hidden))))
    return torch.stack(rows)


def result(model, outputs, mask) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Outputs that count, and the gradients of a function of them."""
    target = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=outputs.dtype)
    used = [p for p in model.parameters() if p is not model.get_output_embeddings().weight]
    loss = (outputs * target)[mask].square().sum()
    gradients = torch.autograd.grad(loss, used, allow_unused=True)
    return outputs.detach()[mask], [g for g in gradients if g is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_are_those_of_each_row_alone(family):
    model = tiny(family, **FAMILIES[family]).double()
    eps = torch.finfo(torch.float32 if family in IN_FLOAT32 else torch.float64).eps
    for completions in (batch(), batch((4, 4, 4)), batch((2, 7, 3), (1, 1, 1)), batch((2,), (5,))):
        assert unmasked(completions) is not None
        mask = completions.mask
        actual, gradients = result(model, reading.completion_hidden(model, completions), mask)
        expected, others = result(model, row_by_row(model, completions), mask)
        masked, _ = result(model, with_a_mask(model, completions), mask)
        size = float(expected.abs().max())
        allowed = 64 * eps * size  # two layers of sums of some tens of terms, in another order
        assert float((actual - expected).abs().max()) <= max(allowed, 2 * float((masked - expected).abs().max()))
        for ours, theirs in zip(gradients, others, strict=True):
            assert float((ours - theirs).abs().max()) <= 1024 * eps * max(size, float(theirs.abs().max()))


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that has W x W numbers in its last axes, masks of attention among them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.bytes = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.shape[-2:] == (self.width, self.width):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("gpt2", FAMILIES["gpt2"]), ("gemma3_text", {"sliding_window": 16}), ("mistral", {})],
)
def test_no_mask_is_made(family, changes):
    """Neither by transformers nor in the kernel; a window that is shorter than the batch still needs one."""
    model, completions = tiny(family, **changes), batch((9, 9, 1), (7, 1, 7))
    width = unmasked(completions).input_ids.shape[1]
    assert width == 9 + 7 - 1  # as wide as with padding in front
    with torch.no_grad(), Largest(width) as before:
        with_a_mask(model, completions)
    with torch.no_grad(), Largest(width) as after:
        reading.completion_hidden(model, completions)
    assert before.bytes >= 3 * width * width and after.bytes == 0


def test_width_is_that_of_the_longest_sequence():
    completions = batch((9, 1), (1, 5))
    sequences = unmasked(completions)
    assert sequences.input_ids.shape == (2, 9)  # 13 with padding in front
    rows = sequences.input_ids.tolist()
    assert rows[0] == completions.prompt_ids[0].tolist()
    assert rows[1][:5] == [*completions.prompt_ids[1, -1:].tolist(), *completions.tokens[1, :4].tolist()]
    assert 0 not in sequences.input_ids  # no padding token, which a model need not have


def test_batches_that_need_a_mask():
    hole = batch()
    hole.mask = hole.mask.clone()
    hole.mask[0, 1] = False
    empty = batch((3, 0, 2))
    behind = batch()
    behind.prompt_mask = behind.prompt_mask.flip(1)
    model = tiny("llama")
    for completions in (hole, empty, behind):
        assert unmasked(completions) is None
        with torch.no_grad():
            outputs = reading.completion_hidden(model, completions)
            assert torch.equal(outputs, with_a_mask(model, completions))
