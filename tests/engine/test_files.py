"""The cache folder, and files that appear whole or not at all."""

import os
from pathlib import Path

import platformdirs
import pytest

from splice_engine import SpliceError, files

NEW, OLD = "Library/Caches/splice-vit", ".cache/splice-vit"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home on a platform whose cache folder is not `~/.cache`."""
    for name in ("SPLICE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(files, "user_cache_path", lambda name, appauthor: tmp_path / "Library" / "Caches" / name)
    return tmp_path


@pytest.mark.parametrize(
    ("existing", "expected"), [((), NEW), ((NEW,), NEW), ((OLD,), OLD), ((OLD, NEW), NEW)], ids=lambda value: str(value)
)
def test_a_cache_of_earlier_versions_is_found(existing, expected, home):
    for folder in existing:
        (home / folder).mkdir(parents=True)
    assert files.cache_folder() == home / expected


def test_a_chosen_cache_comes_first(home, monkeypatch):
    (home / OLD).mkdir(parents=True)
    monkeypatch.setenv("SPLICE_CACHE", "~/chosen")
    assert files.cache_folder() == home / "chosen"
    monkeypatch.setenv("SPLICE_CACHE", "")
    assert files.cache_folder() == home / OLD


def test_the_cache_is_where_the_platform_has_it(monkeypatch, tmp_path):
    monkeypatch.delenv("SPLICE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == Path(platformdirs.user_cache_dir("splice-vit", appauthor=False))


def test_a_new_file_has_the_usual_permissions_and_the_umask_stays(tmp_path, monkeypatch):
    """The umask is that of the whole process: another thread may write a file at that moment."""
    touched = []
    monkeypatch.setattr(os, "umask", touched.append)
    (tmp_path / "usual").touch()
    with files.atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert (sorted(path.name for path in tmp_path.iterdir()), touched) == (["a.txt", "usual"], [])


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")

    def fail():
        with files.atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_what_a_kill_has_left_is_removed(tmp_path):
    """Of that file alone."""
    writing = [files.atomic_path(tmp_path / name) for name in ("a.png", "b.png")]  # not closed, as after a kill
    paths = [context.__enter__() for context in writing]
    (tmp_path / "a.png").write_text("old")
    files.remove_leftovers(tmp_path / "a.png")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a.png", paths[1]])


@pytest.mark.parametrize(("times", "replaced"), [(1, True), (3, True), (9, False)])
def test_a_target_that_another_program_has_open_is_tried_again(times, replaced, tmp_path, monkeypatch):
    """As on Windows, where a viewer or a virus scanner keeps others from replacing a file."""
    refusals, replace = [PermissionError(13, "in use")] * times, Path.replace

    def refuse(path, target):
        if refusals:
            raise refusals.pop()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(files, "RETRIES", (0.0, 0.0, 0.0))
    target = tmp_path / "a.txt"
    try:
        with files.atomic_path(target) as temporary:
            temporary.write_text("new")
    except PermissionError:
        pass
    assert target.exists() == replaced
    assert len(list(tmp_path.iterdir())) == replaced


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n" * 300, "the name is too long; choose a shorter one"),
        ("there.txt", r"there already.*--overwrite.*overwrite=True"),
        ("folder", "it is a folder"),
        ("none/a.txt", "there is no folder"),
        ("there.txt/a.txt", "there is no folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(name, message, tmp_path):
    (tmp_path / "there.txt").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(SpliceError, match=message):
        files.check_place(tmp_path / name)
    files.check_place(tmp_path / "new.txt")
    files.check_place(tmp_path / "there.txt", overwrite=True)
