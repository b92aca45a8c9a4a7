"""The choice of matrix products: made once for a machine."""

import json
import subprocess
import sys

import pytest
import torch

from splice_engine import gemm


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLICE_CACHE", str(tmp_path / "cache"))
    for choice in (gemm.bf16_pays, gemm._onednn_pays):
        choice.cache_clear()
    yield tmp_path / "cache"
    for choice in (gemm.bf16_pays, gemm._onednn_pays):
        choice.cache_clear()


@pytest.mark.parametrize("choice", [True, False])
def test_what_was_measured_before_holds_in_every_process(choice, fresh_cache):
    gemm.bf16_pays()
    path = fresh_cache / "bf16.json"
    (machine,) = json.loads(path.read_text())
    path.write_text(json.dumps({machine: choice}))
    code = f"import torch; torch.set_num_threads({torch.get_num_threads()}); "
    code += "from splice_engine.gemm import bf16_pays; print(bf16_pays())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.split() == [str(choice)]


@pytest.mark.parametrize("damage", ["", "[]", '{"another machine": true}', "{"])
def test_a_damaged_note_is_written_anew(damage, fresh_cache):
    fresh_cache.mkdir()
    (fresh_cache / "bf16.json").write_text(damage)
    choice = gemm.bf16_pays()
    assert choice in json.loads((fresh_cache / "bf16.json").read_text()).values()


def test_a_cache_that_cannot_be_written_does_not_matter(fresh_cache):
    fresh_cache.write_text("a file where the folder should be")
    assert gemm.bf16_pays() in (True, False)
