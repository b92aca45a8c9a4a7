"""The picture of a run that has ended."""

import gc
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from splice_engine import SpliceError, Transfer, preset
from splice_engine.images import resize, sides
from splice_engine.training.result import render_result

SMALL = {"size": 64, "vit_size": 56, "steps": 2, "warm_steps": 2, "match_passes": 1, "density": 1}


@pytest.fixture(scope="module")
def vit(tiny):
    return tiny()


@pytest.fixture
def half_mask(pair):
    mask = torch.zeros(1, 1, *sides(pair[0]))
    mask[..., : mask.shape[-1] // 2] = 1
    return mask


@pytest.mark.parametrize(("masked", "residual", "ema"), [(False, 0.0, 0.5), (True, 0.3, 0.0)])
def test_it_is_that_of_the_run(masked, residual, ema, pair, vit, half_mask):
    settings = preset("draft", **SMALL, residual=residual, ema=ema)
    run = Transfer(*pair, vit, settings, structure_mask=half_mask if masked else None)
    for _ in run:
        pass
    expected = run.image()
    assert torch.equal(render_result(run), expected)
    assert torch.equal(run.image(), expected)  # pictures can still be taken


@pytest.fixture
def limit_memory():
    """A block in which this process finds only so many bytes more than it has."""
    resource, statm = pytest.importorskip("resource", reason="no limits on this system"), Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("what a process has is not told on this system")

    @contextmanager
    def limit(size):
        gc.collect()
        taken = int(statm.read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (taken + size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    return limit


def test_where_memory_does_not_suffice_it_is_smaller_and_enlarged(pair, vit, limit_memory, caplog):
    structure = resize(pair[0], (800, 1000))
    mask = torch.zeros(1, 1, 800, 1000)
    mask[..., :500] = 1
    run = Transfer(structure, pair[1], vit, preset("draft", **SMALL, feather=4.0), structure_mask=mask)
    for _ in run:
        pass
    with limit_memory(120_000_000):
        result = render_result(run)
    expected = run.image()
    assert "out of memory for the result at full size on cpu" in caplog.messages[0]
    assert torch.equal(result[..., 510:], structure[..., 510:])
    assert (result - expected).abs().mean() < 0.02
    assert sides(result) == sides(structure)


def test_a_run_that_has_diverged_has_none(pair, vit):
    run = Transfer(*pair, vit, preset("paper", size=64, vit_size=56, steps=1))
    next(iter(run))
    with torch.no_grad():
        next(run.generator.parameters()).fill_(float("nan"))
    with pytest.raises(SpliceError, match="diverged"):
        render_result(run)
