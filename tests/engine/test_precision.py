"""The choice of matrix products: made once for a machine."""

import json

import pytest
import torch

from splice_engine.vit import precision


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """A new machine: nothing has been measured on it, and a quick measurement will do."""
    with precision.fast_fp32():  # its own choice is made before, with care
        pass
    monkeypatch.setenv("SPLICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(precision, "TIMED_ROUNDS", 2)
    precision.bf16_is_faster.cache_clear()
    yield tmp_path / "cache"
    precision.bf16_is_faster.cache_clear()


@pytest.mark.parametrize("choice", [True, False])
def test_what_was_measured_before_holds_in_every_process(choice, fresh_cache):
    precision.bf16_is_faster()
    path = fresh_cache / "bf16.json"
    (machine,) = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({machine: choice}), encoding="utf-8")
    precision.bf16_is_faster.cache_clear()  # as in a new process
    assert precision.bf16_is_faster() is choice


@pytest.mark.parametrize("damage", ["", "[]", '{"another machine": true}', "{"])
def test_a_damaged_note_is_written_anew(damage, fresh_cache):
    fresh_cache.mkdir()
    (fresh_cache / "bf16.json").write_text(damage, encoding="utf-8")
    choice = precision.bf16_is_faster()
    assert choice in json.loads((fresh_cache / "bf16.json").read_text(encoding="utf-8")).values()


def test_a_cache_that_cannot_be_written_does_not_matter(fresh_cache):
    fresh_cache.write_text("a file where the folder should be", encoding="utf-8")
    assert precision.bf16_is_faster() in (True, False)


def test_products_stay_exact():
    """Whichever kernel is taken; outside of the block the setting is as it was."""
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(200, 300, generator=rng), torch.randn(300, 100, generator=rng)
    outside = a @ b
    with precision.fast_fp32():
        inside = a @ b
    exact = a.double() @ b.double()
    assert (inside - exact).abs().max() / exact.abs().max() < precision.TOLERANCE
    assert torch.equal(a @ b, outside)
