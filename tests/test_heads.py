"""Hidden states and head of tiny random models: together they are the model's own logits."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny_models import BASE, FAMILIES, assert_both_halves_are, assert_same, batch, tiny, transformers

import cmdp_fast as cf


@pytest.mark.parametrize(("family", "changes", "softcap", "scale"), FAMILIES)
def test_families(family, changes, softcap, scale):
    model = tiny(family, **changes)
    head = cf.head_of(model)
    assert (head.softcap, head.scale) == (softcap, scale)
    assert head.weight is model.get_output_embeddings().weight
    assert_both_halves_are(model)


def test_multimodal_gemma3():
    text = BASE | {"model_type": "gemma3_text", "final_logit_softcapping": 2.0}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=100,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).train()
    ids = torch.tensor([[5, 100, 100, 100, 100, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": (ids == 100).long()}
    assert_both_halves_are(model, **inputs, pixel_values=torch.randn(1, 3, 28, 28))
    assert cf.head_of(model).softcap is None  # unlike the text model it does not apply the softcap it is given


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    """A softcap is recognised in low precision too, where the model's own small logits would not show it."""
    model = tiny("gemma2", final_logit_softcapping=30.0).to(dtype)
    head = cf.head_of(model)
    assert head.softcap == 30.0 and head.weight.dtype == dtype
    with torch.no_grad():
        hidden = cf.last_hidden_state(model, **batch())
        assert hidden.dtype == dtype
        expected = model(**batch()).logits
        torch.testing.assert_close(head.logits(hidden), expected, equal_nan=True)  # padding may attend to nothing


def test_the_head_sees_no_rows_and_everything_is_left_as_it_was():
    model = tiny().train()
    model.model.layers[0].eval()
    head, rows = model.lm_head, []
    head.register_forward_hook(lambda module, args, out: rows.append(out.numel()))
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    cf.head_of(model)
    assert rows == [2 * 101] and cf.head_of(model).weight is head.weight and len(rows) == 1  # looked at only once
    cf.last_hidden_state(model, **batch())
    assert rows[1:] == [0]
    assert [module.training for module in model.modules()] == modes
    assert not head._forward_pre_hooks and len(head._forward_hooks) == 1
    assert torch.equal(torch.get_rng_state(), state) and head.weight.grad is None
    with pytest.raises(RuntimeError):  # an error inside the model
        cf.last_hidden_state(model, torch.zeros(2, 7))
    assert not head._forward_pre_hooks


def test_nothing_keeps_a_model_alive_and_a_change_of_its_configuration_is_seen():
    model = tiny("gemma2", final_logit_softcapping=30.0)
    assert cf.head_of(model).softcap == 30.0
    model.config.final_logit_softcapping = 7.0
    assert cf.head_of(model).softcap == 7.0
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_inputs_of_the_model_pass_through():
    model = tiny()
    with torch.no_grad():
        everything = cf.last_hidden_state(model, **batch())
        assert torch.equal(cf.last_hidden_state(model, **batch(), logits_to_keep=3), everything[:, -3:])
        embeddings = model.get_input_embeddings()(batch()["input_ids"])
        mask = batch()["attention_mask"]
        assert_same(cf.last_hidden_state(model, attention_mask=mask, inputs_embeds=embeddings), everything)
        shifted = torch.arange(7).flip(0)[None].expand(2, 7)
        assert not torch.allclose(cf.last_hidden_state(model, **batch(), position_ids=shifted), everything)


def test_gradient_checkpointing():
    model = tiny().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_both_halves_are(model)


def test_autocast():
    """The hidden states enter the head as they do in the model; the product is in the region's dtype."""
    model = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**batch()).logits
        hidden = cf.last_hidden_state(model, **batch())
        actual = cf.head_of(model).logits(hidden)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(actual, expected)
