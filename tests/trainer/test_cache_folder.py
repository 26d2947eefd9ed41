"""The folder of built-in models: nobody else can put one there."""

import os
import stat
from types import SimpleNamespace

import pytest

from cmdp_fast.errors import InputError
from cmdp_fast.trainer.models import cache


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "above" / "cache"))
    return tmp_path / "above" / "cache" / "cmdp_fast"


def make(folder):
    (folder / "model").write_text("weights")


def test_it_is_made_for_its_owner_alone(place):
    assert cache.cache_dir() == place and not place.exists()
    before = os.umask(0)
    try:
        made = cache.made_once(place / "model-1", make, print)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (place, made)] == [0o700, 0o700]
    assert cache.cache_dir() == place


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_a_folder_of_ones_own_stays_as_it_is(place, mode):
    """One that an earlier version has made, or that a group shares."""
    place.mkdir(parents=True)
    place.chmod(mode)
    assert cache.cache_dir() == place
    assert stat.S_IMODE(place.stat().st_mode) == mode


def test_a_folder_that_everybody_may_write_to_is_refused(place):
    place.mkdir(parents=True)
    place.chmod(0o777)
    for look in (cache.cache_dir, lambda: cache.made_once(place / "model-1", make, print)):
        with pytest.raises(InputError, match=f"may be written to by everybody, with any model: chmod go-w {place}"):
            look()
    assert not any(place.iterdir())


@pytest.mark.parametrize(
    ("user", "owner", "refused"), [(1000, 1001, True), (1000, 1000, False), (1000, 0, False), (0, 1000, False)]
)
def test_another_users_folder_is_refused(place, monkeypatch, user, owner, refused):
    stated = SimpleNamespace(st_uid=owner, st_mode=stat.S_IFDIR | 0o755)
    monkeypatch.setattr(cache.os, "geteuid", lambda: user)
    place.mkdir(parents=True)
    monkeypatch.setattr(type(place), "stat", lambda self, **_: stated)
    if refused:
        with pytest.raises(InputError, match=r"is another user's.*set XDG_CACHE_HOME"):
            cache.cache_dir()
    else:
        assert cache.cache_dir() == place
