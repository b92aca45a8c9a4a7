"""The cache folder."""

from pathlib import Path

import platformdirs
import pytest

from splice_engine import files

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
