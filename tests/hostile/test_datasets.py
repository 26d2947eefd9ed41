"""Datasets that somebody else wrote: files that lie about what they hold, that change under the reader, and that are no
files. Rows, or one line; and odd files that are honest are read."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from cmdp_fast.errors import InputError
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.tasks import sizes
from cmdp_fast.trainer.tasks.data import load_problems

Make = Callable[[Path], Any]
ROWS = [{"prompt": f"{i}+1=", "answer": str(i)} for i in range(40)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = "prompt,answer\n" + "".join(f"{i}+1=,{i}\n" for i in range(40))


def loaded(path: Path, **changes: Any) -> int:
    """How many problems there are, and all of their prompts are texts."""
    config = {"dataset": str(path), "task": "", "prompt_template": "", "holdout_fraction": 0.3, **changes}
    found = load_problems(TrainConfig(**config))
    assert all(isinstance(row["prompt"], (str, list)) for some in found for row in some)
    return sum(map(len, found))


def file(name: str, content: str | bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    return make


def table(prompts: Any, damage: Callable[[bytes], bytes] = bytes, **columns: Any) -> Make:
    """A Parquet file with these prompts, whose bytes are changed."""

    def make(folder: Path) -> Path:
        path, array = folder / "a.parquet", pa.array(prompts) if isinstance(prompts, list) else prompts
        answers = pa.array([str(i) for i in range(len(array))])
        parquet.write_table(pa.table({"prompt": array, "answer": answers, **columns}), path)
        path.write_bytes(damage(path.read_bytes()))
        return path

    return make


TEXTS = [row["prompt"] for row in ROWS]


def footer(change: Callable[[bytes], bytes], length: int | None = None) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        size = struct.unpack("<I", content[-8:-4])[0]
        new = change(content[-8 - size : -8])
        return content[: -8 - size] + new + struct.pack("<I", len(new) if length is None else length) + b"PAR1"

    return damage


def varint(value: int) -> bytes:
    """A number as Thrift's compact protocol has it."""
    value, digits = value << 1, b""
    while value > 127:
        digits, value = digits + bytes([value & 127 | 128]), value >> 7
    return digits + bytes([value])


def all_counts(count: int) -> Callable[[bytes], bytes]:
    return footer(lambda about: about.replace(b"\x16" + varint(40), b"\x16" + varint(count)))


def the_file_s_count(count: int) -> Callable[[bytes], bytes]:
    """That of all rows alone, which stands behind those of the columns."""
    old = b"\x16" + varint(40)
    return footer(
        lambda about: b"\x16".join([about[: (at := about.index(old))], b""]) + varint(count) + about[at + 2 :]
    )


def several(edit: Callable[[Path], object]) -> Make:
    """A dataset of two splits, changed."""

    def make(folder: Path) -> Path:
        rows = datasets.Dataset.from_list(ROWS)
        datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(folder / "d"))
        edit(folder / "d")
        return folder / "d"

    return make


def splits(content: str) -> Make:
    return several(lambda folder: (folder / "dataset_dict.json").write_text(content))


def logged(folder: Path) -> None:
    """A folder beside that is somebody else's."""
    (folder / "logs").mkdir()
    (folder / "logs" / "state.json").write_text("{}")


def at(kind: Callable[[Path], object], name: str) -> Make:
    def make(folder: Path) -> Path:
        kind(folder / name)
        return folder / name

    return make


def saved(edit: Callable[[Path], object]) -> Make:
    """What `save_to_disk` writes, changed."""

    def make(folder: Path) -> Path:
        path = folder / "saved"
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
        edit(path)
        return path

    return make


def state(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        about = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**about, **changes}))

    return edit


def arrow(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(next(folder.glob("*.arrow")))


def replaced(kind: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: (path.unlink(), kind(path))


def far_offsets(path: Path) -> None:
    """A text that is said to lie a gibibyte behind the file."""
    content = bytearray(path.read_bytes())
    place = content.index(struct.pack("<4i", 0, 4, 8, 12))
    content[place + 4 : place + 8] = struct.pack("<i", 2**30)
    path.write_bytes(content)


def twice(folder: Path) -> None:
    state(_data_files=json.loads((folder / "state.json").read_text())["_data_files"] * 20_000)(folder)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def both(folder: Path) -> None:
    """A folder that is a dataset, and has one that is good."""
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "part"))
    arrow(replaced(os.mkfifo))(folder)


def masked(folder: Path) -> None:
    """Splits, and a state of their folder's own that is good and that `datasets` does not read."""
    (folder / "state.json").write_text('{"_data_files": []}')
    arrow(replaced(os.mkfifo))(folder / "test")


NO_TEXTS = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(struct.pack("<3i", 0, 1, 2)), pa.py_buffer(b"\xff\xfe")]
)
REFUSED: dict[str, tuple[Make, str]] = {
    "a CSV with a longer row": (file("a.csv", TABLE + "1,2,3,4\n"), "Expected 2 fields in line 42, saw 4"),
    "a CSV with an open quote": (file("a.csv", TABLE + '"1,2\n3,4\n'), "EOF inside string"),
    "a CSV with a name twice": (file("a.csv", "prompt,prompt\n" + "1,2\n" * 9), "is of type int"),
    "a CSV in UTF-16": (file("a.csv", TABLE.encode("utf-16")), "codec can't decode"),
    "a CSV in Latin-1": (file("a.csv", TABLE.encode() + b"\xe9,1\n"), "codec can't decode"),
    "a CSV of a head": (file("a.csv", "prompt,answer\n"), "there are no rows in it"),
    "a CSV of 10^5 columns": (
        file("a.csv", "prompt" + ",a" * 10**5 + "\n1"),
        "100,001 columns, expected at most 10,000",
    ),
    "a Parquet without its end": (table(TEXTS, lambda content: content[:-20]), "magic bytes not found in footer"),
    "a Parquet without its middle": (table(TEXTS, lambda c: c[: len(c) // 2] + c[-8:]), "thrift"),
    "a Parquet of 10^5 columns": (
        lambda folder: table(["1", "2"], **{f"c{i}": pa.array([1, 2]) for i in range(10_001)})(folder),
        "10,003 columns, expected at most 10,000",
    ),
    "a footer of 2 GiB": (table(TEXTS, footer(bytes, 2**31 - 1)), "smaller than the size reported by footer"),
    "a footer of 2^40 rows": (table(TEXTS, all_counts(2**40)), "1,099,511,627,776 rows take 307,200.0 GiB at least"),
    "lists of lists": (table(pa.array([[["a"]]] * 9)), "a message that is of type list"),
    "a struct": (table(pa.array([{"a": 1}] * 9)), "is of type dict"),
    "a map": (table(pa.array([[("a", 1)]] * 9, pa.map_(pa.string(), pa.int64()))), "map<string, int64"),
    "bytes": (table(pa.array([b"1"] * 9)), "is of type bytes"),
    "no prompts": (table(pa.nulls(9)), "row 1, is None"),
    "times": (table(pa.array([0] * 9, pa.timestamp("us"))), "is of type datetime"),
    "texts that are none": (table(NO_TEXTS), "codec can't decode byte 0xff"),
    "JSON that is deep": (file("a.jsonl", LINES + "[" * 10**5), "line 41: it is too deep"),
    "JSON with a key twice": (file("a.jsonl", LINES + '{"prompt": "1", "prompt": "2"}\n'), "specified twice"),
    "JSON that is cut": (file("a.jsonl", LINES[:-9]), "line 40: Unterminated string"),
    "a pipe": (at(os.mkfifo, "a.jsonl"), "is a pipe, a device or the like"),
    "a pipe of no name": (at(os.mkfifo, "a"), "is a pipe, a device or the like"),
    "a device": (at(zeros, "a.csv"), "is a pipe, a device or the like"),
    "a folder of a file's name": (at(os.mkdir, "a.parquet"), "doesn't contain any data files"),
    "gzip": (file("a.jsonl.gz", gzip.compress(LINES.encode())), "a file must end in"),
    "saved: a pipe": (saved(arrow(replaced(os.mkfifo))), "expected a file beside it"),
    "saved: a device": (saved(arrow(replaced(zeros))), "expected a file beside it"),
    "saved: a part that is good": (saved(both), "expected a file beside it"),
    "saved: another file": (saved(state(_data_files=[{"filename": "../../etc/passwd"}])), "expected a file beside it"),
    "saved: no files": (saved(state(_data_files=[])), "list index"),
    "saved: a number of files": (saved(state(_data_files=5)), "is none of a saved dataset"),
    "saved: a file very often": (saved(twice), "names a file twice"),
    "saved: another state": (saved(lambda folder: (folder / "state.json").write_bytes(b"\xff")), "none of a saved"),
    "saved: a deep state": (saved(lambda folder: (folder / "state.json").write_text("[" * 10**5)), "none of a saved"),
    "saved: texts elsewhere": (saved(arrow(far_offsets)), "its files are damaged: .* out of bounds"),
    "several: a pipe": (several(lambda folder: arrow(replaced(os.mkfifo))(folder / "test")), "expected a file beside"),
    "several: a pipe behind a state": (several(masked), "expected a file beside"),
    "several: elsewhere": (splits('{"splits": ["../d/train"]}'), "expected the names of folders beside it"),
    "several: above": (splits('{"splits": [".."]}'), "expected the names of folders beside it"),
    "several: a text": (splits('{"splits": "train"}'), "lists no splits: they are no list"),
    "several: none": (splits("{}"), "lists no splits"),
    "saved: cut": (saved(arrow(lambda path: os.truncate(path, 300))), "saved: "),
    "saved: another type": (
        saved(
            lambda folder: (folder / "dataset_info.json").write_text('{"features": {"prompt": {"_type": "os.system"}}}')
        ),
        "Feature type 'os.system' not found",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_lie_are_one_line(case, tmp_path):
    make, said = REFUSED[case]
    path = make(tmp_path)
    with pytest.raises(InputError, match=said) as raised:
        loaded(path)
    assert str(path) in str(raised.value) and str(raised.value).isprintable() and len(str(raised.value)) < 2000


HONEST: dict[str, tuple[Make, int]] = {
    "a CSV with a shorter row": (file("a.csv", TABLE + "1=\n"), 41),
    "a CSV with a mark": (file("a.csv", codecs.BOM_UTF8 + TABLE.encode()), 40),
    "a CSV of an old system": (file("a.csv", TABLE.replace("\n", "\r")), 40),
    "a CSV of answers of many kinds": (file("a.csv", TABLE + "1=,one\n"), 41),
    "a CSV of 500 columns": (file("a.csv", TABLE.replace("\n", "," * 500 + "\n").replace("1=", "=")), 40),
    "a cell of a megabyte": (file("a.csv", TABLE + "x" * 10**6 + ",2\n"), 41),
    "a CSV that is gzip": (file("a.csv", gzip.compress(TABLE.encode())), 40),
    "a Parquet": (table(TEXTS), 40),
    "a Parquet of large texts": (table(pa.array(TEXTS, pa.large_string())), 40),
    "a Parquet of a dictionary": (table(pa.array(TEXTS).dictionary_encode()), 40),
    "a Parquet of messages": (table(pa.array([[{"role": "user", "content": text}] for text in TEXTS])), 40),
    "a Parquet that miscounts": (table(TEXTS, the_file_s_count(41)), 40),
    "a line of a megabyte": (file("a.jsonl", LINES + json.dumps({"prompt": "x" * 10**6, "answer": "1"}) + "\n"), 41),
    "a folder with more": (
        lambda folder: (file("train.jsonl", LINES)(folder), os.mkfifo(folder / "more.jsonl"), folder)[-1],
        40,
    ),
    "a folder of gzip": (lambda folder: file("train.jsonl.gz", gzip.compress(LINES.encode()))(folder).parent, 40),
    "saved": (saved(lambda folder: None), 40),
    "saved, of another form": (saved(state(_format_type="numpy")), 40),
    "saved, by a link": (
        saved(arrow(lambda path: path.symlink_to(path.rename(path.parent.parent / "elsewhere.arrow")))),
        40,
    ),
    "saved, beside another's state": (saved(logged), 40),
    "saved, several": (several(lambda folder: None), 40),
    "saved, several beside another's state": (several(logged), 40),
    "a CSV of an old system with many rows": (
        file("a.csv", "prompt,answer\r" + "".join(f"{i}+1=,2\r" for i in range(10_001))),
        10_001,
    ),
}


@pytest.mark.parametrize("case", HONEST)
def test_odd_files_that_are_honest_are_read(case, tmp_path):
    make, count = HONEST[case]
    assert loaded(make(tmp_path)) == count


@pytest.fixture
def memory_of(monkeypatch):
    """A machine with so many bytes free, on which every byte counts."""

    def of(free: int | None) -> None:
        monkeypatch.setattr(sizes, "free_memory", lambda device: free)
        monkeypatch.setattr(sizes, "HARMLESS", 0)

    return of


def test_a_small_file_of_many_rows(tmp_path, monkeypatch, memory_of):
    """Ten kilobytes can hold so many that they take all memory, and are refused before they are unpacked."""
    path = table(pa.DictionaryArray.from_arrays(pa.array([0] * 10**6, pa.int8()), ["1+1="]))(tmp_path)
    memory_of(2**28)
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(
        InputError, match=r"1,000,000 rows take 286.1 MiB at least, and 256.0 MiB of memory are free: a"
    ):
        loaded(path)


def test_rows_that_are_not_kept_take_no_memory(tmp_path, memory_of):
    """With --streaming and without: `datasets` unpacks to disk, a part at a time."""
    path = table(TEXTS)(tmp_path)
    memory_of(39 * sizes.ROW)
    with pytest.raises(InputError, match=r"40 rows take .* a smaller --max-rows keeps the first ones alone"):
        loaded(path)
    assert loaded(path, max_rows=39) == loaded(path, max_rows=39, streaming=True) == 39


def test_little_is_never_refused(tmp_path, monkeypatch):
    """What the system calls free is no promise: a machine that seems full reads what takes less than a gibibyte."""
    zipped = file("b.jsonl", gzip.compress(LINES.encode()))(tmp_path)
    path = table(TEXTS)(tmp_path)
    monkeypatch.setattr(sizes, "free_memory", lambda device: 0)
    assert loaded(zipped) == loaded(path) == 40
    with pytest.raises(InputError, match=r"4,000,000 rows take 1.1 GiB at least, and 0.0 MiB of memory are free"):
        sizes.check_rows(4_000_000, "it", 0)


def test_gzip_that_unpacks_to_more_than_memory(tmp_path, monkeypatch, memory_of):
    path = file("a.jsonl", gzip.compress(LINES.encode() + b" " * 2**23))(tmp_path)
    assert loaded(path) == 40
    memory_of(2**22)
    assert loaded(path, max_rows=10) == 10
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(
        InputError, match=r"it is gzip, and unpacks to more than 4.0 MiB, and 4.0 MiB of memory are free"
    ):
        loaded(path)


def test_rows_are_counted_of_what_is_no_single_file(tmp_path, memory_of):
    file("train.jsonl", LINES)(tmp_path)
    memory_of(39 * sizes.ROW)
    with pytest.raises(InputError, match=r"40 rows take .* a smaller --max-rows"):
        loaded(tmp_path)
    assert loaded(tmp_path, max_rows=39) == 39
    memory_of(None)  # a system that does not tell
    assert loaded(tmp_path) == 40


def test_values_behind_the_rows_that_are_read_are_not_looked_at(tmp_path):
    """A split of a terabyte is not read for its first ten rows."""
    path = saved(arrow(lambda path: path.write_bytes(path.read_bytes().replace(b"39+1=", b"39\xff1="))))(tmp_path)
    assert loaded(path, max_rows=39) == 39
    for most in (0, 40):
        with pytest.raises(InputError, match=r"its files are damaged: .* Invalid UTF8"):
            loaded(path, max_rows=most)


def test_a_cell_that_unpacks_to_more_than_memory(tmp_path, memory_of):
    path = table([*TEXTS, "x" * 2**24])(tmp_path)
    assert path.stat().st_size < 2**21
    memory_of(2**23)
    with pytest.raises(InputError, match="a part of it unpacks to"):
        loaded(path)


@pytest.mark.parametrize("inside", [False, True], ids=["a column", "a list"])
@pytest.mark.parametrize("saved_", [False, True], ids=["a file", "a saved dataset"])
def test_a_cell_that_names_a_file_has_nothing_opened(saved_, inside, tmp_path):
    """An image, by what the file says of itself: a path, a pipe or an address of whoever made it."""
    os.mkfifo(tmp_path / "pipe")  # who opens it waits for ever
    cell = {"bytes": None, "path": str(tmp_path / "pipe")}
    plain: Any = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    column = datasets.List(plain) if inside else plain
    features = datasets.Features(prompt=datasets.Value("string"), answer=datasets.Value("string"), image=column)
    rows = [{"prompt": text, "answer": "1", "image": [cell] if inside else cell} for text in TEXTS]
    made, about = datasets.Dataset.from_list(rows, features=features), features.to_dict()
    about["image"] = {"feature": {"_type": "Image"}, "_type": "List"} if inside else {"_type": "Image"}
    if saved_:
        made.save_to_disk(str(path := tmp_path / "d"))
        info = json.loads((path / "dataset_info.json").read_text()) | {"features": about}
        (path / "dataset_info.json").write_text(json.dumps(info))
    else:
        said = {"huggingface": json.dumps({"info": {"features": about}})}
        parquet.write_table(made.data.table.replace_schema_metadata(said), path := tmp_path / "a.parquet")
    for streaming in (False, True):
        config = TrainConfig(
            dataset=str(path), task="", prompt_template="", holdout_fraction=0.3, streaming=streaming, max_rows=40
        )
        assert load_problems(config).train[0]["image"] == ([cell] if inside else cell)


@pytest.mark.parametrize("change", ["grows", "shrinks"])
def test_a_file_that_changes_while_it_is_read(change, tmp_path, monkeypatch):
    """It is what was there, or one line."""
    path = file("a.jsonl", LINES * 100)(tmp_path)
    over = threading.Event()

    def changes() -> None:
        size = path.stat().st_size
        while not over.is_set():
            if change == "grows" and size < 10**6:  # it ends: one that grows faster than it is read has no end
                size += len(LINES)
                with open(path, "a") as more:
                    more.write(LINES)
            elif change == "shrinks" and size > 1000:
                size -= 777
                os.truncate(path, size)

    thread = threading.Thread(target=changes)
    thread.start()
    try:
        assert loaded(path) <= 40
    except InputError as error:
        assert str(path) in str(error) and str(error).isprintable()
    finally:
        over.set()
        thread.join()
