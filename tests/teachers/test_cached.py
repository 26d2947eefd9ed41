"""A teacher on disk says what the teacher said that filled it, to the bit; and of a damaged folder, one line."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_teacher import TOKENIZER, completions, teacher_of
from tiny_models import tiny

import cmdp_fast as cf
from cmdp_fast import scoring
from cmdp_fast.digest import sha256, write_sealed
from cmdp_fast.errors import InputError
from cmdp_fast.teachers.cached import CachedTeacher
from cmdp_fast.teachers.cached.writer import CacheWriter, _topk, contents_of
from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.open import open_teacher
from cmdp_fast.teachers.teacher import Teacher, TeacherOutputs, TopK

Pairs = list[tuple[list[int], list[int]]]


def pairs_of(batch: SimpleNamespace) -> Pairs:
    """Prompts and completions of a batch without their padding; those that are empty are no completions."""
    rows = zip(batch.prompt_ids, batch.prompt_mask, batch.tokens, batch.mask, strict=True)
    every = [(prompt[seen].tolist(), tokens[real].tolist()) for prompt, seen, tokens, real in rows]
    return [pair for pair in every if pair[1]]


def filled(
    folder: Path, teacher: Teacher, parts: list[Pairs], k: int = 0, dtype: str = "", at_once: int = 64, size: int = 1
) -> CachedTeacher:
    """A folder with a shard for each part, opened."""
    writer = CacheWriter(folder, contents_of(teacher, k, dtype, {"made": "here"}), teacher, size)
    for part in parts:
        writer.store(part, len({tuple(prompt) for prompt, _ in part}), at_once)
    writer.finish()
    opened = open_teacher(f"cached:{folder}")
    assert isinstance(opened, CachedTeacher)
    return opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with three completions each."""
    batch, other = completions(), completions(seed=1)
    filled(tmp_path / "cache", teacher_of(), [pairs_of(batch), pairs_of(other)])
    return tmp_path / "cache"


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_those_of_the_teacher_that_filled_it(family, dtype, tmp_path):
    """Bitwise, with a head's softcap, scale and bias; of both kinds of scoring."""
    teacher = TeacherInProcess(tiny(family).to(dtype), TOKENIZER, "a teacher")
    student, batch = tiny(family, seed=1).to(dtype), completions(lengths=(4, 1, 6, 2))
    cached = filled(tmp_path / "c", teacher, [pairs_of(batch)])
    assert cached.about == teacher.about and cached.vocabulary() == teacher.vocabulary()
    for kind in ("tiled", "full"):
        results = []
        for asked in (cached, teacher):
            models = (student, asked)
            score = scoring.make_scoring(kind, models, 101, 0.7, 1.3)
            outputs = (score.outputs(student, batch), score.outputs(asked, batch))
            results.append(score.token_stats(models, outputs, batch.tokens, batch.mask))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_another_dtype_rounds_once(stored, tmp_path):
    """Each number of a hidden state is rounded to the stored dtype, and comes in the teacher's own."""
    teacher, batch = teacher_of(), completions()
    cached = filled(tmp_path / "c", teacher, [pairs_of(batch)], dtype=stored)
    said, exact = cached.of_completions(batch), teacher.of_completions(batch)
    assert said.as_hidden().dtype == torch.float32
    assert torch.equal(said.as_hidden(), exact.as_hidden().to(getattr(torch, stored)).float())
    assert said.bytes == int(batch.mask.sum()) * 16 * (2 if stored == "bfloat16" else 4)


def test_log_probabilities_are_the_largest_of_the_whole_vocabulary(tmp_path):
    teacher, batch = teacher_of("gemma2"), completions()
    cached = filled(tmp_path / "c", teacher, [pairs_of(batch)], k=5)
    topk = cached.of_completions(batch).topk
    every = teacher.of_completions(batch).as_logits().double().log_softmax(-1)
    expected, ids = every.topk(5)
    assert torch.equal(topk.ids[batch.mask], ids[batch.mask])
    torch.testing.assert_close(topk.logprobs[batch.mask].double(), expected[batch.mask], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(topk.floor[batch.mask].double(), every.amin(-1)[batch.mask], atol=1e-6, rtol=1e-6)
    with pytest.raises(TypeError, match="has no head"):
        cached.own_head()


def test_log_probabilities_of_a_large_vocabulary_are_as_exact_as_float32():
    """Or a bound that is made of them is false: PyTorch's softmax of a row in float32 adds up in sequence, and a
    small tail of many tokens is lost in it. Of a model with itself both divergences are 0."""
    width = 152_064
    logits = torch.zeros(2, width) + 0.01 * torch.sin(torch.arange(float(width)))
    logits[:, :3] += torch.tensor([16.0, 15.0, 14.5])
    ids, logprobs, floor = _topk(TeacherOutputs(logits=logits, bytes=0, seconds=0.0), 4)
    exact = logits.double().log_softmax(-1)
    eps = torch.finfo(torch.float32).eps
    assert (logprobs - exact.gather(-1, ids)).abs().max() <= eps * exact.gather(-1, ids).abs().max()
    assert (floor - exact.amin(-1)).abs().max() <= eps * exact.abs().max()
    stats = cf.topk_stats(logits.double(), ids, logprobs, torch.tensor([0, 1]))
    assert not stats.forward_kl.any() and not stats.reverse_kl.any()


def test_a_teacher_of_log_probabilities_alone_is_stored_too(folder, tmp_path):
    """Of more than are wanted the largest are kept; hidden states it does not have."""
    batch = completions()
    five = filled(tmp_path / "five", teacher_of(), [pairs_of(batch)], k=5)
    three = filled(tmp_path / "three", five, [pairs_of(batch)], k=3)
    ours, theirs = three.of_completions(batch).topk, five.of_completions(batch).topk
    assert torch.equal(ours.ids, theirs.ids[..., :3]) and torch.equal(ours.logprobs, theirs.logprobs[..., :3])
    with pytest.raises(InputError, match="answers with topk"):
        contents_of(five)
    with pytest.raises(InputError, match="expected at least 6"):
        filled(tmp_path / "six", five, [pairs_of(batch)], k=6)
    with pytest.raises(InputError, match="has 101 tokens"):
        contents_of(five, 102)


@pytest.mark.parametrize("size", [1, 2**30])
def test_rows_are_found_in_any_question(size, tmp_path):
    """Alone, together with others, from one shard or several, and threads; and some of a completion's last tokens."""
    teacher = teacher_of()
    cached = filled(tmp_path / "c", teacher, [pairs_of(completions(seed=seed)) for seed in (0, 1)], size=size)
    pairs = pairs_of(completions()) + pairs_of(completions(seed=1))
    rows = [[*prompt, *completion[:-1]] for prompt, completion in pairs]
    counts = [len(completion) for _, completion in pairs]
    under_way = [cached.ask([row], [count]) for row, count in zip(rows, counts, strict=True)] * 3
    together = cached.ask(rows, counts).result()
    alone = [future.result().as_hidden() for future in under_way]
    assert torch.equal(together.as_hidden(), torch.cat(alone[: len(rows)]))
    assert together.bytes == together.as_hidden().nbytes
    exact = [teacher.answer([row], [count]).as_hidden() for row, count in zip(rows, counts, strict=True)]
    torch.testing.assert_close(together.as_hidden(), torch.cat(exact))
    assert torch.equal(cached.answer(rows[:1], [2]).as_hidden(), alone[0][-2:])
    assert cached.answer(rows[:1], [0]).as_hidden().shape == (0, 16)


def test_completions_that_differ_in_their_end_share_their_outputs(tmp_path):
    """And all of them are there, in order, those that are equal too."""
    several = [[4, 5, 6], [4, 5, 7], [4, 5], [4, 5, 6]]
    cached = filled(tmp_path / "c", teacher_of(), [[([1, 2], each) for each in several], [([1, 2, 4], [5])]])
    assert cached.completions.of([1, 2]) == several
    assert cached.completions.of([1, 2, 4]) == [[5]]
    assert cached.completions.of([1]) == cached.completions.of([2**40]) == cached.completions.of([]) == []
    assert [len(shard.outputs["hidden"]) for shard in cached.completions._shards] == [5, 1]


def test_a_row_that_is_not_stored_is_one_line(folder):
    cached = open_teacher(f"cached:{folder}")
    with pytest.raises(InputError, match=r"holds no completion that a row of 3 tokens is of \(1 2 3 …, 2 outputs\)"):
        cached.ask([[1, 2, 3]], [2]).result()
    prompt, completion = pairs_of(completions())[0]
    with pytest.raises(InputError, match="outputs"):  # more of it than are there
        cached.ask([[*prompt, *completion[:-1]]], [len(completion) + 1]).result()


def test_an_empty_cache_is_one(tmp_path):
    cached = filled(tmp_path / "c", teacher_of(), [])
    assert cached.completions.of([1]) == []
    assert cached.answer([], []).as_hidden().shape == (0, 16)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_what_is_not_asked_for_is_not_in_memory(tmp_path):
    """64 MiB of hidden states are opened, and one row of them is read."""

    class Zeros(TeacherInProcess):
        def answer(self, rows, wanted):
            return TeacherOutputs(hidden=torch.zeros(sum(wanted), self.about.hidden_size), head=self.head)

    model = tiny(hidden_size=4096, intermediate_size=8, max_position_embeddings=5000)
    teacher = Zeros(model, TOKENIZER)
    long = [3] * 4096
    filled(tmp_path / "c", teacher, [[([1], long)]])

    def own() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)
        return int(line.split()[1]) * 1024

    before = own()
    cached = open_teacher(f"cached:{tmp_path / 'c'}")
    cached.answer([[1, *long[:-1]]], [1])
    assert own() - before < 32 * 2**20


# --------------------------------------------------------------------------------------------------------------
# Damage


def index_of(folder: Path) -> dict[str, Any]:
    value = json.loads((folder / "cache.json").read_text())
    del value["sha256"]
    return value


def resealed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """An index that somebody has changed, and sealed again."""

    def damage(folder: Path) -> None:
        value = index_of(folder)
        change(value)
        write_sealed(folder / "cache.json", value)

    return damage


def rewritten(change: Callable[[dict[str, torch.Tensor]], object], **metadata: str) -> Callable[[Path], None]:
    """A second shard that somebody has written otherwise, with an index that fits it."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    def damage(folder: Path) -> None:
        path, value = folder / "shard-00001.safetensors", index_of(folder)
        with safe_open(path, "pt") as file:
            words = file.metadata() | metadata
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, metadata=words)
        value["shards"][1] |= {"sha256": sha256(path), "size": path.stat().st_size}
        write_sealed(folder / "cache.json", value)

    return damage


def truncated(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def flipped(name: str, place: int = -9) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (folder / name).write_bytes(content)

    return damage


def piped(name: str) -> Callable[[Path], None]:
    """A file that has no end."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def of_another_model(folder: Path) -> None:
    """Its second shard is that of a cache by another teacher, with its size and sha256."""
    other = folder.with_name("other")
    filled(other, teacher_of(seed=3), [pairs_of(completions()), pairs_of(completions(seed=1))])
    shutil.copy(other / "shard-00001.safetensors", folder)
    resealed(lambda value: value["shards"].__setitem__(1, index_of(other)["shards"][1]))(folder)


def another_head(folder: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path, value = folder / "head.safetensors", index_of(folder)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, metadata=metadata)
    value["head"]["sha256"] = sha256(path)
    write_sealed(folder / "cache.json", value)


def repeated(folder: Path) -> None:
    """The second shard has the first one's completions, with other outputs."""
    from safetensors.torch import load_file

    first = load_file(folder / "shard-00000.safetensors")
    rewritten(lambda tensors: tensors.update({**first, "hidden": first["hidden"] + 1}))(folder)


SHARD = r"shard-00001\.safetensors"
DAMAGES = {
    "truncated": (truncated, f"{SHARD}: it has \\d+ bytes, expected"),
    "a bit": (flipped("shard-00001.safetensors"), f"{SHARD}: it is not as it was written"),
    "a bit of the index": (flipped("cache.json"), r"cache\.json"),
    "a bit of the head": (flipped("head.safetensors"), r"head\.safetensors: it is not as it was written"),
    "no shard": (lambda folder: (folder / "shard-00001.safetensors").unlink(), f"{SHARD} is not there"),
    "no head": (lambda folder: (folder / "head.safetensors").unlink(), r"head\.safetensors is not there"),
    "no index": (lambda folder: (folder / "cache.json").unlink(), r"there is no cache\.json"),
    "another model": (of_another_model, f"{SHARD}: it belongs to another cache"),
    "no vocabulary": (lambda folder: (folder / "vocabulary.json").unlink(), r"vocabulary\.json is not there"),
    "another vocabulary": (
        lambda folder: write_sealed(folder / "vocabulary.json", {"tokens": {"a": 0}}),
        r"vocabulary\.json: it is not the vocabulary of a teacher",
    ),
    "no tokens": (
        lambda folder: write_sealed(folder / "vocabulary.json", {"tokens": {"a": "0"}}),
        r"vocabulary\.json: it is no table of tokens and numbers",
    ),
    "ends": (resealed(lambda value: value["contents"]["about"].update(ends=[101])), "its ends are no tokens"),
    "another head": (another_head, r"head\.safetensors: it is not the head of a teacher"),
    "repeated": (repeated, r"shard-00000.* and shard-00001.*: one row stands there twice, with different outputs"),
    "version": (resealed(lambda value: value.update(version=2)), r"cache\.json: its version is 2, expected 1"),
    "unknown": (resealed(lambda value: value.update(more=1)), r"cache\.json: it has other fields"),
    "a name": (
        resealed(lambda value: value["shards"][1].update(name="../../secrets")),
        r"cache\.json: a shard has other fields than sha256, size",
    ),
    "no number": (resealed(lambda value: value["shards"][1].update(size="9")), r"a shard: size is no int"),
    "true": (resealed(lambda value: value["shards"][1].update(prompts=True)), r"a shard: prompts is no int"),
    "negative": (resealed(lambda value: value["shards"][1].update(outputs=-1)), "a negative size"),
    "dtype": (resealed(lambda value: value["contents"].update(dtype="int8")), "its dtype is none of"),
    "its teacher's dtype": (
        resealed(lambda value: value["contents"]["about"].update(dtype="int8")),
        r"cache\.json: it computes in something else",
    ),
    "a pipe": (piped("shard-00001.safetensors"), f"{SHARD} is not there"),
    "a vocabulary that is a pipe": (piped("vocabulary.json"), "vocabulary.json is not there"),
    "k": (resealed(lambda value: value["contents"].update(k=3)), "something else than hidden states"),
    "softcap": (resealed(lambda value: value["head"].update(softcap=-1.0)), "the scale or the softcap of its head"),
    "headless": (resealed(lambda value: value.update(head=None)), "none beside hidden states"),
    "width": (resealed(lambda value: value["contents"]["about"].update(hidden_size=-1)), "sizes that no model has"),
    "name": (resealed(lambda value: value["contents"]["about"].update(model="\x1b[2J")), "no plain text"),
    "unfinished": (resealed(lambda value: value.update(whole=False)), "it is not finished"),
    "other about": (
        resealed(lambda value: value["contents"]["about"].update(positions=7)),
        r"head\.safetensors: it belongs to another cache|belongs to another cache",
    ),
    "more tensors": (rewritten(lambda t: t.update(more=torch.zeros(1))), f"{SHARD}: it has other tensors"),
    "narrow": (rewritten(lambda t: t.update(hidden=t["hidden"][:, :8].clone())), f"{SHARD}: hidden is .*8.*16"),
    "wide": (rewritten(lambda t: t.update(hidden=t["hidden"].double())), f"{SHARD}: hidden is .*float64"),
    "few": (rewritten(lambda t: t.update(hidden=t["hidden"][:-1].clone())), f"{SHARD}: hidden is"),
    "flat": (rewritten(lambda t: t.update(tokens=t["tokens"][None].clone())), f"{SHARD}: tokens is"),
    "lengths": (rewritten(lambda t: t["lengths"].add_(1)), f"{SHARD}: its completions have 23 tokens, and it has 20"),
    "no prompt": (rewritten(lambda t: t["prompt_lengths"].zero_()), "a prompt or a completion has no tokens"),
    "places": (rewritten(lambda t: t["places"].add_(1)), f"{SHARD}: the outputs of a completion are not there"),
    "far places": (rewritten(lambda t: t["places"].fill_(2**62)), "the outputs of a completion are not there"),
    "before": (rewritten(lambda t: t["places"].sub_(1)), "the outputs of a completion are not there"),
    "tokens": (rewritten(lambda t: t["tokens"].fill_(101)), "a token is none of the 101 of a teacher"),
    "of another": (rewritten(lambda t: None, cache="0" * 64), f"{SHARD}: it belongs to another cache"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_one_line(name, folder):
    """Before anything is used, with the name of the file."""
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(InputError, match=message) as raised:
        open_teacher(f"cached:{folder}")
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused_where_they_are_read(number, folder):
    rewritten(lambda tensors: tensors["hidden"].fill_(number))(folder)
    cached = open_teacher(f"cached:{folder}")
    cached.of_completions(completions())
    with pytest.raises(InputError, match=f"{SHARD}: its hidden states are not all finite"):
        cached.of_completions(completions(seed=1))


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("topk_logprobs", 0.1, "not all log-probabilities"),
        ("topk_logprobs", math.nan, "not all log-probabilities"),
        ("floors", math.inf, "its floors are not all log-probabilities"),
        ("topk_ids", 101, "its topk_ids are not all tokens"),
        ("topk_ids", -1, "its topk_ids are not all tokens"),
        ("topk_ids", 5, "its topk_ids name a token twice"),
    ],
)
def test_log_probabilities_that_are_none_are_refused(name, number, message, tmp_path):
    parts = [pairs_of(completions()), pairs_of(completions(seed=1))]
    filled(tmp_path / "c", teacher_of(), parts, k=5)
    rewritten(lambda tensors: tensors[name].fill_(number))(tmp_path / "c")
    with pytest.raises(InputError, match=message):
        open_teacher(f"cached:{tmp_path / 'c'}").of_completions(completions(seed=1))


def test_an_excluded_token_may_have_no_floor(tmp_path):
    class Excludes(TeacherInProcess):
        def answer(self, rows, wanted):
            logits = super().answer(rows, wanted).as_logits()
            logits[:, 0] = -math.inf
            return TeacherOutputs(logits=logits)

    cached = filled(tmp_path / "c", Excludes(tiny(), TOKENIZER), [pairs_of(completions())], k=5)
    floor = cached.of_completions(completions()).topk.floor
    assert torch.isneginf(floor[completions().mask]).all()


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (TeacherOutputs(hidden=torch.full((11, 16), math.nan)), "not all finite"),
        (TeacherOutputs(hidden=torch.zeros(10, 16)), "another number of outputs than 11"),
        (TeacherOutputs(topk=TopK(torch.zeros(11, 2), torch.zeros(11, 2))), "no hidden states"),
    ],
)
def test_what_a_teacher_should_not_say_is_not_stored(outputs, message, tmp_path):
    class Wrong(TeacherInProcess):
        def answer(self, rows, wanted):
            return replace(outputs, head=self.head)

    with pytest.raises((InputError, TypeError), match=message):
        filled(tmp_path / "c", Wrong(tiny(), TOKENIZER, "a teacher"), [pairs_of(completions())])
    assert index_of(tmp_path / "c")["shards"] == []


def test_a_folder_is_begun_by_one_teacher(folder):
    teacher = teacher_of(seed=3)
    with pytest.raises(InputError, match="holds other answers"):
        CacheWriter(folder, contents_of(teacher, source={"made": "here"}), teacher, 1)
    truncated(folder)
    teacher = teacher_of()
    with pytest.raises(InputError, match=f"{SHARD}: it has .*; remove the folder to begin again"):
        CacheWriter(folder, contents_of(teacher, source={"made": "here"}), teacher, 1)


def test_the_command_that_makes_a_folder_is_one_to_be_pasted(tmp_path):
    place = str(tmp_path / "my cache; rm")
    with pytest.raises(InputError) as raised:
        CachedTeacher.open(place, None)
    assert f"--output {shlex.quote(place)} makes it" in str(raised.value)
