"""Which files a model's folder may name as its weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from cmdp_fast.weight_files import ADAPTER, INDEX, ONE, check_weight_files, read_index

PLAIN = SimpleNamespace()  # a configuration that names no files
GOOD = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


def write_index(folder: Path, places: object) -> Path:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / INDEX


def test_names_of_files_beside_the_index(tmp_path):
    check_weight_files(str(tmp_path), PLAIN)  # which may have no weights yet
    assert read_index(write_index(tmp_path, GOOD)) == GOOD
    check_weight_files(str(tmp_path), PLAIN)


@pytest.mark.parametrize(
    "file",
    [
        *("a.bin", "model.safetensors.bin", "a.SAFETENSORS", "..", "", 5, None, ["a.safetensors"]),
        *("../tea/model.safetensors", "/tea/model.safetensors", "./a.safetensors", "sub/a.safetensors"),
        *("..\\a.safetensors", "a\0.safetensors", "a.safetensors/", "a\u202e.safetensors"),
    ],
)
@pytest.mark.parametrize("beside", ["", ONE])
def test_any_other_name_is_refused(file, beside, tmp_path):
    """Beside whole weights too, which transformers takes first: another program need not."""
    if beside:
        (tmp_path / beside).touch()
    write_index(tmp_path, {**GOOD, "c": file})
    with pytest.raises(
        ValueError, match=rf"its {INDEX} names .* expected plain names of files \.safetensors"
    ) as raised:
        check_weight_files(str(tmp_path), PLAIN)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "[" * 100_000, "\ud800"]
)
def test_what_is_no_index_is_refused(text, tmp_path):
    (tmp_path / INDEX).write_text(text, errors="surrogatepass")
    with pytest.raises(ValueError, match=f"its {INDEX} cannot be read") as raised:
        check_weight_files(str(tmp_path), PLAIN)
    assert str(raised.value).isprintable()


def test_weights_that_the_configuration_names_are_refused(tmp_path):
    """transformers takes `adapter_model.bin` there, which is a pickle, and another index."""
    for name in ("adapter_model.bin", "other.safetensors.index.json"):
        with pytest.raises(ValueError, match=f"transformers_weights, {name}: expected its weights in {ONE}"):
            check_weight_files(str(tmp_path), SimpleNamespace(transformers_weights=name))


def test_an_adapter_beside_the_model_is_refused(tmp_path):
    (tmp_path / ADAPTER).write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(ValueError, match=f"beside the model lies an {ADAPTER}.*merge the adapter"):
        check_weight_files(str(tmp_path), PLAIN)


@pytest.mark.parametrize("bad", [False, True])
def test_in_the_hubs_cache_every_file_is_a_link(bad, tmp_path, monkeypatch):
    """Whose name counts, and not that of the file that it leads to."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo, commit = tmp_path / "models--owner--name", "0" * 40
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    content = {"config.json": "{}", INDEX: json.dumps({"weight_map": GOOD | ({"c": "a.bin"} if bad else {})})}
    for number, (name, text) in enumerate(content.items()):
        (repo / "blobs" / str(number)).write_text(text)
        os.symlink(f"../../blobs/{number}", repo / "snapshots" / commit / name)
    if bad:
        with pytest.raises(ValueError, match=r"names 'a\.bin'"):
            check_weight_files("owner/name", PLAIN)
    else:
        check_weight_files("owner/name", PLAIN)
    check_weight_files("owner/another", PLAIN)  # of which the cache holds nothing
