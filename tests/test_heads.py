"""Hidden states and head of tiny random models: together they are the model's own logits, or an error says why not."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

import cmdp_fast as cf

transformers = pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

BASE = {
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
# (family, its settings, softcap, scale)
FAMILIES = [
    ("llama", {}, None, 1.0),
    ("llama", {"tie_word_embeddings": True}, None, 1.0),  # SmolLM
    ("smollm3", {}, None, 1.0),
    ("qwen2", {"tie_word_embeddings": True}, None, 1.0),
    ("qwen3", {}, None, 1.0),
    ("mistral", {}, None, 1.0),
    ("gemma2", {"final_logit_softcapping": 0.5}, 0.5, 1.0),
    ("gemma2", {"final_logit_softcapping": None}, None, 1.0),
    ("gemma3_text", {}, None, 1.0),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, 30.0, 1.0),
    ("phi", {}, None, 1.0),  # a bias
    ("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 2}, None, 1.0),
    ("opt", {"word_embed_proj_dim": 8, "ffn_dim": 32}, None, 1.0),  # a projection between base model and head
    ("cohere", {"logit_scale": 0.0625}, None, 0.0625),
    ("granite", {"logits_scaling": 6.0}, None, 1 / 6.0),  # divides by it
    ("hyperclovax", {"logits_scaling": 3.0}, None, 3.0),  # multiplies by it
    ("minicpm3", LATENT | {"dim_model_base": 8}, None, 1.0),  # divides before the head
]


def tiny(family: str = "llama", seed: int = 0, **changes) -> nn.Module:
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(BASE | {"initializer_range": 0.2} | changes))
    model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        nn.init.normal_(head.bias)
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    """Two sequences, the second padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 101, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order in which a few float32 numbers are rounded."""
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        actual.float(), expected.float(), rtol=0, atol=8 * eps * float(expected.detach().abs().max())
    )


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_both_halves_are(model: nn.Module, inner: nn.Module | None = None, **inputs) -> None:
    """Logits, and the gradient of a function of them, are those of the model itself."""
    inner = inner or model
    inputs = batch() | inputs
    expected = inner(**inputs).logits
    target = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected.log_softmax(-1) * target).sum().backward()
    by_logits = gradients(inner)

    hidden = cf.last_hidden_state(model, **inputs)
    head = cf.head_of(model)
    assert hidden.shape == (*expected.shape[:2], head.weight.shape[1])
    actual = head.logits(hidden)
    assert_same(actual, expected.detach())
    (actual.log_softmax(-1) * target).sum().backward()
    by_halves = gradients(inner)
    assert by_halves.keys() == by_logits.keys() != set()
    for name, grad in by_halves.items():
        assert_same(grad, by_logits[name])


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


# --------------------------------------------------------------------------------------------------------------
# Wrapped models


class Peft(nn.Module):
    """What a PEFT model looks like from outside: calls and attributes are the base model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, **inputs):
        return self.base_model(**inputs)


def test_peft():
    model = tiny()
    assert_both_halves_are(Peft(model), model)


def test_data_parallel_gradients_are_reduced(tmp_path):
    """The wrapper itself runs, so that it synchronises the gradient of every parameter, the head's included."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for unused in (False, True):
            model = tiny()
            wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=unused)
            reduced = []

            def count(_, bucket, reduced=reduced):
                reduced.append(len(bucket.gradients()))
                future = torch.futures.Future()
                future.set_result(bucket.buffer())
                return future

            wrapped.register_comm_hook(None, count)
            head = cf.head_of(wrapped)
            model(**batch()).logits.square().sum().backward()
            expected = gradients(model)
            for _ in range(2):
                reduced.clear()
                head.logits(cf.last_hidden_state(wrapped, **batch())).square().sum().backward()
                assert sum(reduced) == len(expected)
                for name, grad in gradients(wrapped.module).items():
                    assert_same(grad, expected[name])
    finally:
        torch.distributed.destroy_process_group()


def test_fully_sharded(tmp_path):
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain = tiny()
        model = copy.deepcopy(plain)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        hidden = cf.last_hidden_state(model, **batch())
        logits = cf.head_of(model).logits(hidden)
        expected = plain(**batch()).logits
        assert_same(logits, expected)
        logits.square().sum().backward()
        expected.square().sum().backward()
        for (name, sharded), (_, whole) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert sharded.grad is not None, name
            assert_same(sharded.grad.full_tensor(), whole.grad)
    finally:
        torch.distributed.destroy_process_group()


class Graphs:
    """A backend of torch.compile that runs what it is given and counts the graphs."""

    def __init__(self) -> None:
        torch.compiler.reset()
        self.count = 0

    def __call__(self, graph, _):
        self.count += 1
        return graph.forward


def compiled(how: str, model: nn.Module, backend: Graphs) -> nn.Module:
    if how == "wrapped":
        return torch.compile(model, backend=backend)
    if how == "in place":
        model.compile(backend=backend)
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend=backend)
    else:
        model.model.compile(backend=backend)
    return model


@pytest.mark.parametrize("how", ["wrapped", "in place", "forward", "base model"])
def test_compiled(how):
    """The model is not compiled again for the hooks, nor its graph used with or without them when it should not be."""
    plain = tiny()
    graphs = Graphs()
    model = compiled(how, copy.deepcopy(plain), graphs)
    head = cf.head_of(model)
    with torch.no_grad():
        expected = plain(**batch()).logits
        cf.last_hidden_state(model, **batch())
        assert (graphs.count > 0) == (how == "base model")
        assert_same(model(**batch()).logits, expected)
        before = graphs.count
        for _ in range(3):
            assert_same(head.logits(cf.last_hidden_state(model, **batch())), expected)
            assert_same(model(**batch()).logits, expected)
        assert graphs.count == before > 0


def test_called_from_compiled_code():
    model = tiny()
    head = cf.head_of(model)
    graphs, inputs = Graphs(), batch()
    step = torch.compile(lambda: head.logits(cf.last_hidden_state(model, **inputs)).sum(), backend=graphs)
    with torch.no_grad():
        expected = model(**batch()).logits.sum()
        for _ in range(3):
            assert_same(step(), expected)
    assert graphs.count == 1, "the head's part alone"


# --------------------------------------------------------------------------------------------------------------
# Refusals


class Custom(LlamaForCausalLM):
    """A Llama that does something to its logits that no configuration mentions."""

    def __init__(self, change) -> None:
        torch.manual_seed(0)
        super().__init__(LlamaConfig(**BASE))
        self.change = change

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.change(out.logits)
        return out


UNKNOWN = {
    "scale": lambda x: x * 1.001,
    "softcap": lambda x: 50 * torch.tanh(x / 50),
    "bias": lambda x: x + 0.01,
    "one column": lambda x: x.index_fill(-1, torch.tensor([7]), torch.finfo(x.dtype).min),
    "temperature": lambda x: x / 0.7,
    "nan": lambda x: x * float("nan"),
    "clamp": lambda x: x.clamp(-100, 100),
    "permuted": lambda x: x.flip(-1),
    "log-softmax": lambda x: x.log_softmax(-1),
}


@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_postprocessing_is_refused(change):
    with pytest.raises(ValueError, match=r"Custom does something to its logits that is not known here.*softcap=None"):
        cf.head_of(Custom(change))


def test_scale_and_softcap_together():
    """The scale comes first, as in Muse; a model that does it the other way round is refused."""
    model = Custom(lambda x: 20 * torch.tanh(x * 0.5 / 20))
    model.config.output_multiplier, model.config.final_logit_softcapping = 0.5, 20.0
    assert (cf.head_of(model).softcap, cf.head_of(model).scale) == (20.0, 0.5)
    assert_both_halves_are(model)
    other = Custom(lambda x: 0.5 * 20 * torch.tanh(x / 20))
    other.config = model.config
    with pytest.raises(ValueError, match="not known here"):
        cf.head_of(other)


def test_columns_that_are_cut_are_refused():
    with pytest.raises(ValueError, match=r"logits of shape \[1, 2, 90\] from the \[1, 2, 101\] of its head"):
        cf.head_of(Custom(lambda x: x[..., :90]))


def test_a_forward_that_was_replaced_is_refused():
    model = tiny()
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(x) * 1.01
    with pytest.raises(ValueError, match="does not return h W\\^T \\+ b: something changes its forward"):
        cf.head_of(model)


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x)


class Quantized(nn.Linear):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__(16, 101, bias=False)
        self.weight = nn.Parameter(base.weight.detach().to(torch.int8), requires_grad=False)


class Packed(torch.Tensor):
    """A tensor that claims a dtype in which it is not stored."""


class Multi(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_heads_that_are_not_plain_are_refused():
    cases = [
        (Lora, TypeError, r"LlamaForCausalLM, a Lora, carries an adapter.*target modules"),
        (Quantized, TypeError, r"is quantized: its weight is a Parameter of torch.int8; expected a plain tensor"),
        (lambda _: Multi(16, 101), TypeError, r"a Multi, is not a plain torch.nn.Linear"),
        (lambda _: nn.Sequential(nn.Linear(16, 101)), TypeError, r"a Sequential, is not a plain torch.nn.Linear"),
        (lambda head: head.to("meta"), ValueError, r"the weight of .* is offloaded; expected all of it, \[101, 16\]"),
    ]
    for replace, error, message in cases:
        model = tiny()
        model.lm_head = replace(model.lm_head)
        with pytest.raises(error, match=message):
            cf.head_of(model)
    model = tiny()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Packed))
    with pytest.raises(TypeError, match="is quantized: its weight is a "):
        cf.head_of(model)
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match=r"is sharded, its shape is \[0\]; expected all of it, \[101, 16\]"):
        cf.head_of(model)


def test_models_that_are_no_causal_language_models_are_refused():
    for function in (cf.head_of, cf.last_hidden_state):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
            function("gpt2")
        with pytest.raises(TypeError, match=r"LlamaModel has no output embedding.*get_output_embeddings"):
            function(tiny().model)
        with pytest.raises(TypeError, match=r"Linear has no output embedding"):
            function(nn.Linear(2, 2))


def test_a_head_that_is_called_twice_or_never_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="called its output embedding 2 times; expected once"):
        cf.last_hidden_state(CalledAgain(model), **batch())
    model.get_output_embeddings = lambda: nn.Linear(16, 101)
    for function in (cf.head_of, lambda m: cf.last_hidden_state(m, **batch())):
        with pytest.raises(ValueError, match="LlamaForCausalLM called its output embedding 0 times"):
            function(model)


class CalledAgain(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        self.module(**inputs)
        return self.module(**inputs)


def test_labels_are_refused():
    with pytest.raises(TypeError, match="labels= makes the model compute a loss"):
        cf.last_hidden_state(tiny(), **batch(), labels=batch()["input_ids"])


class Tuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(101, 16), nn.Linear(16, 101)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids):
        return (self.head(self.embed(input_ids)),)


def test_a_model_of_another_library():
    """Hidden states need no more than `get_output_embeddings`; the head needs `.logits` as well."""
    model = Tuples()
    ids = batch()["input_ids"]
    assert torch.equal(cf.last_hidden_state(model, ids), model.embed(ids))
    with pytest.raises(TypeError, match=r"Tuples returned a tuple; expected an output with .logits"):
        cf.head_of(model)


def test_transformers_is_not_imported():
    code = "import sys, cmdp_fast; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
