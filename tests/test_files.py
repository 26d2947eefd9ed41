"""Files that appear whole: what somebody else has put where they are written is never written to."""

import errno
import os
import stat
from pathlib import Path

import pytest

from cmdp_fast.digest import Damaged, check_digests, read_sealed, sha256, write_sealed
from cmdp_fast.errors import InputError
from cmdp_fast.files import open_as_others, replacing, write_text, writing


def test_a_link_that_comes_at_the_last_moment_is_not_followed(tmp_path, monkeypatch):
    """Between the removal of what was there and the first byte, as in a folder where others may make files."""
    victim, file, unlink = tmp_path / "victim", tmp_path / "file", Path.unlink
    victim.write_text("mine")

    def planted(path, missing_ok=False):
        unlink(path, missing_ok=missing_ok)
        if path.name == ".file" and not os.path.lexists(path):
            path.symlink_to(victim)

    monkeypatch.setattr(Path, "unlink", planted)
    with pytest.raises(InputError, match=r"could not be written: .*File exists"):
        write_text(file, "text")
    assert victim.read_text() == "mine" and not file.exists()


@pytest.mark.parametrize("full", [True, False])
def test_a_full_disk_is_said_where_a_library_does_not(full, tmp_path, monkeypatch):
    """PyTorch says `[enforce fail at inline_container.cc:672] . unexpected pos`."""

    def refused(_):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(InputError) as error, writing(tmp_path / "checkpoints" / "step-000004"):
        raise RuntimeError("[enforce fail at x] . unexpected pos 64 vs 0")
    reason = "no space left on device: " if full else ""
    assert str(error.value).endswith(
        f"step-000004 could not be written: {reason}[enforce fail at x] . unexpected pos 64 vs 0"
    )
    assert not list(tmp_path.iterdir())


def rights(path):
    return stat.S_IMODE(path.stat().st_mode)


def closed(path):
    """As safetensors leaves one: its own, in the place of what was there."""
    other = path.with_name("other")
    other.touch(mode=0o600)
    other.replace(path)


def test_a_file_has_the_rights_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "text")
        write_text(tmp_path / "secret", "text", 0o600)
        with replacing(tmp_path / "weights") as part:
            closed(part)
        (tmp_path / "model" / "adapter").mkdir(parents=True)
        for name in ("model/a.safetensors", "model/adapter/b.safetensors", "model/c.json"):
            closed(tmp_path / name)
        open_as_others(tmp_path / "model")
    finally:
        os.umask(before)
    names = ("file", "weights", "model/a.safetensors", "model/adapter/b.safetensors")
    assert [rights(tmp_path / name) for name in names] == [0o640] * 4
    assert [rights(tmp_path / name) for name in ("secret", "model/c.json")] == [0o600] * 2
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"a.safetensors", "adapter", "c.json"}


def test_a_file_system_that_takes_no_rights_still_gets_the_file(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fchmod", refused)
    with replacing(tmp_path / "file") as part:
        closed(part)
    (tmp_path / "a.safetensors").touch(mode=0o600)
    open_as_others(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "a.safetensors"}


def test_no_rights_are_given_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.touch(mode=0o600)
    with pytest.raises(InputError, match="could not be written"), replacing(tmp_path / "file") as part:
        part.unlink()
        part.symlink_to(victim)
    assert rights(victim) == 0o600


def test_the_body_writes_the_file_and_nothing_is_left_where_it_fails(tmp_path):
    with replacing(tmp_path / "file") as part:
        part.write_bytes(b"a longer one")
    with pytest.raises(KeyError), replacing(tmp_path / "other"):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("made", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_not_read(tmp_path, made):
    """A pipe would wait for a writer, and that device has no end."""
    write_sealed(tmp_path / "sealed.json", {"a": 1})
    assert read_sealed(tmp_path / "sealed.json") == {"a": 1}
    made(tmp_path / "other")
    with pytest.raises(OSError, match="other is no file"):
        sha256(tmp_path / "other")
    with pytest.raises(Damaged, match="other cannot be read: other is no file"):
        read_sealed(tmp_path / "other")
    with pytest.raises(Damaged, match="other is not there, or cannot be read"):
        check_digests(tmp_path, {"other": "0"})
