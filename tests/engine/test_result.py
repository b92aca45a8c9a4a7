"""The picture of a run that has ended."""

import ctypes
import gc
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from splice_engine import (
    Generator,
    Refinement,
    RefinementSettings,
    SpliceError,
    Transfer,
    apply_generator,
    preset,
    render,
)
from splice_engine.images import resize, sides
from splice_engine.training.result import render_result

pytestmark = pytest.mark.usefixtures("coarse_matching")

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


@pytest.mark.parametrize(
    ("masked", "residual", "refine_steps"), [(False, 0.0, 0), (True, 0.0, 0), (False, 1.0, 0), (True, 1.0, 1)]
)
def test_a_saved_generator_gives_the_picture_of_its_run(masked, residual, refine_steps, pair, vit, half_mask, tmp_path):
    settings = preset("draft", **SMALL, residual=residual, refine_steps=refine_steps)
    run = Transfer(*pair, vit, settings, structure_mask=half_mask if masked else None)
    for _ in run:
        pass
    result, path = render_result(run), tmp_path / "pair.safetensors"
    run.generator.save(path)
    generator, other = Generator.load(path), pair[0].flip(-1)
    assert (apply_generator(generator, pair[0]) - result).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(apply_generator(generator, other), render(generator, other, size=generator.metadata["size"]))
    further = Transfer(*pair, vit, settings, generator=generator).generator
    assert torch.equal(apply_generator(further, pair[0]), render(further, pair[0], size=further.metadata["size"]))


M_MMAP_THRESHOLD = -3
"""Of glibc's mallopt."""


@pytest.fixture
def limit_memory():
    """A block in which this process finds only so many bytes more than it has."""
    resource, statm = pytest.importorskip("resource", reason="no limits on this system"), Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("what a process has is not told on this system")

    options = getattr(ctypes.CDLL(None), "mallopt", None)

    @contextmanager
    def limit(size):
        gc.collect()
        if options:  # what is free in the heap would come to it: let each block have pages of its own
            options(M_MMAP_THRESHOLD, 2**16)
        taken = int(statm.read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (taken + size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
            if options:
                options(M_MMAP_THRESHOLD, 2**25)

    return limit


@pytest.mark.parametrize("kind", [Transfer, Refinement])
def test_where_memory_does_not_suffice_it_is_smaller_and_enlarged(kind, pair, vit, limit_memory, caplog):
    height, width = (800, 1000) if kind is Transfer else (1600, 2000)
    structure = resize(pair[0], (height, width))
    mask = torch.zeros(1, 1, height, width)
    mask[..., : width // 2] = 1
    recipes = {
        Transfer: preset("draft", **SMALL, feather=4.0),
        Refinement: RefinementSettings(match_passes=1, size=64, steps=1, density=1, feather=4.0),
    }
    run = kind(structure, pair[1], vit, recipes[kind], structure_mask=mask)
    for _ in run:
        pass
    with limit_memory(120_000_000 if kind is Transfer else 180_000_000):
        result = render_result(run)
    expected = run.image()
    assert "out of memory for the result at full size on cpu" in caplog.messages[0]
    assert torch.equal(result[..., width // 2 + 10 :], structure[..., width // 2 + 10 :])
    assert (result - expected).abs().mean() < 0.02
    assert sides(result) == sides(structure)


def test_a_run_that_has_diverged_has_none(pair, vit):
    run = Transfer(*pair, vit, preset("paper", size=64, vit_size=56, steps=1))
    next(iter(run))
    with torch.no_grad():
        next(run.generator.parameters()).fill_(float("nan"))
    with pytest.raises(SpliceError, match="diverged"):
        render_result(run)
