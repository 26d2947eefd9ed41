"""A head and what surrounds it, out of a model's files and an architecture without numbers: those of the model."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import FAMILIES, tiny

from cmdp_fast.errors import InputError
from cmdp_fast.heads import head_of, last_hidden_state
from cmdp_fast.teachers.on_vllm.stored_head import StoredModel
from cmdp_fast.trainer.models.builtin import _tokenizer

REFUSED = {"opt": "could not be run without its numbers|changes what its last norm gives", "minicpm3": "changes what"}


def stored(folder, model, **options) -> StoredModel:
    model.save_pretrained(folder, **options)
    _tokenizer(["0123456789"]).save_pretrained(folder)
    return StoredModel(str(folder))


def with_norms(family="llama", **options):
    """A model whose norms have numbers of their own, where a fresh one has ones."""
    model = tiny(family, **options)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return model


@pytest.mark.parametrize(("family", "options", "softcap", "scale"), FAMILIES)
def test_the_head_is_the_models(family, options, softcap, scale, tmp_path):
    """Bitwise; and hidden states of the model have the mean square that its final norm gives, another's do not."""
    model = with_norms(family, **options)
    read = stored(tmp_path, model)
    if family in REFUSED:
        with pytest.raises(InputError, match=rf"({REFUSED[family]}).*\?k=20"):
            read.head(torch.float32)
        return
    head, gain = read.head(torch.float32)
    own = head_of(model)
    assert torch.equal(head.weight, own.weight) and (head.softcap, head.scale) == (softcap, pytest.approx(scale))
    assert head.bias is None if own.bias is None else torch.equal(head.bias, own.bias)
    with torch.no_grad():
        hidden = last_hidden_state(model, torch.arange(3, 20)[None])[0]
    eps = torch.finfo(torch.float32).eps
    assert ((gain.mean_square(hidden) - 1).abs() < 0.01 + gain.rounding(hidden, eps)).all()
    assert ((gain.mean_square(hidden.flip(-1)) - 1).abs() > 0.01).any()


def test_no_more_is_read_than_the_head_and_the_norm(tmp_path):
    """The other shards may be missing."""
    read = stored(tmp_path, with_norms(), max_shard_size="7KB")
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(places.values())) > 2
    whole = read.revision()
    for shard in set(places.values()) - {places["lm_head.weight"], places["model.norm.weight"]}:
        (tmp_path / shard).unlink()
    head, _ = read.head(torch.bfloat16)
    assert head.weight.dtype == torch.bfloat16 and len(whole) == 64


def test_files_of_a_larger_model_and_of_a_base_model(tmp_path):
    """Their tensors have a prefix more, or less, than the names in the model."""
    from safetensors.torch import load_file, save_file

    model = with_norms(tie_word_embeddings=True)
    read = stored(tmp_path, model)
    tensors = load_file(tmp_path / "model.safetensors")
    for rename in (lambda name: f"language_model.{name}", lambda name: name.removeprefix("model.")):
        save_file({rename(name): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        assert torch.equal(read.head(torch.float32)[0].weight, model.lm_head.weight)


def test_a_revision_is_that_of_all_weights(tmp_path):
    """Two models that differ in one tensor have two."""
    model = with_norms()
    revisions = [stored(tmp_path / "a", model).revision(), stored(tmp_path / "b", model).revision()]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.1
    revisions.append(stored(tmp_path / "c", model).revision())
    assert revisions[0] == revisions[1] != revisions[2]


def test_the_ends_are_those_of_generation_before_the_configurations(tmp_path):
    """And the tokenizer's; a configuration may name one alone, and a model have no settings of generation."""
    read = stored(tmp_path, tiny(eos_token_id=7))
    own = read.tokenizer.eos_token_id
    assert read.ends() == tuple(sorted({7, own}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9, 500]}))
    assert read.ends() == tuple(sorted({8, 9, own}))
    (tmp_path / "generation_config.json").unlink()
    assert read.ends() == tuple(sorted({7, own}))


def rewrite_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def without_head(folder):
    rewrite_index(folder, lambda places: places.pop("lm_head.weight"))


def leads_elsewhere(folder):
    rewrite_index(folder, lambda places: places.update({"lm_head.weight": "../other.safetensors"}))


def leads_to_another(folder):
    def change(places):
        places["lm_head.weight"] = next(file for file in places.values() if file != places["lm_head.weight"])

    rewrite_index(folder, change)


def truncated(folder):
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])


def missing(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()


def no_index(folder):
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)


def deleted(folder):
    (folder / "model.safetensors.index.json").unlink()


def other_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_head, "has no tensor lm_head.weight among the"),
        (leads_elsewhere, r"its model.safetensors.index.json names '../other.safetensors' as a file of weights"),
        (leads_to_another, r"model-0.*safetensors cannot be read"),
        (truncated, "cannot be read"),
        (missing, "is not there"),
        (no_index, "its model.safetensors.index.json cannot be read"),
        (deleted, "has neither model.safetensors nor"),
        (other_shape, r"lm_head.weight is \[101, 16\] of torch.float32, expected \[99, 16\]"),
    ],
)
def test_damaged_files_are_named(damage, message, tmp_path):
    stored(tmp_path, with_norms(), max_shard_size="7KB")
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        StoredModel(str(tmp_path)).head(torch.float32)
    assert str(tmp_path) in str(raised.value) and str(raised.value).isprintable()


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no configuration of the model .*none.*\?model=FOLDER"):
        StoredModel(str(tmp_path / "none"))
