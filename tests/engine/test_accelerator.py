"""The engine on CUDA or ROCm, against itself on the CPU; skipped where there is neither."""

import pytest
import torch

from splice_engine import (
    Generator,
    InstantTransfer,
    Inversion,
    Transfer,
    attention_map,
    inversion_preset,
    measure,
    pca,
    preset,
    render,
    similarity_map,
)
from splice_engine.images import resize
from splice_engine.training.rendering import render_anywhere
from splice_engine.training.result import render_result
from splice_engine.vit.devices import is_out_of_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")


@pytest.fixture(scope="module")
def there(load_real):
    """The real backbone on the device, in fp32."""
    return load_real("cuda", torch.float32)


@pytest.fixture(autouse=True)
def exact():
    """Convolutions in full fp32, as on the CPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def test_features_are_those_of_the_cpu(there, backbone, pair, gap):
    here = backbone.features(pair[0], size=224)
    assert gap(there.features(pair[0].cuda(), size=224).tokens.cpu(), here.tokens) < 1e-4


@pytest.mark.parametrize("changes", [{}, {"warm_steps": 3, "match_passes": 1}])
def test_a_run_begins_as_on_the_cpu(there, backbone, pair, changes):
    settings = preset("draft" if changes else "paper", size=64, vit_size=56, **changes)
    here, away = (next(iter(Transfer(*pair, vit, settings))).floats() for vit in (backbone, there))
    assert away == pytest.approx(here, rel=0.01)  # later steps drift apart: Adam makes much of small differences


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_run_paints_and_keeps_what_is_outside(dtype, pair, load_real):
    mask = torch.zeros(1, 1, *pair[0].shape[-2:])
    mask[..., 20:70, 30:90] = 1
    run = Transfer(
        *pair,
        load_real("cuda", dtype),
        preset("draft", size=64, vit_size=112, warm_steps=20, steps=10, feather=4),
        structure_mask=mask,
        appearance_mask=torch.ones(1, 1, 20, 20),
    )
    for step in run:
        assert torch.isfinite(step.total)
    picture = run.image().cpu()
    assert torch.equal(picture[..., :10, :], pair[0][..., :10, :])
    assert (picture - pair[0])[..., 25:65, 35:85].abs().mean() > 0.02


def test_the_instant_transfer_is_that_of_the_cpu(there, backbone, pair):
    here, away = (InstantTransfer.between(*pair, vit, short_patches=16).image().cpu() for vit in (backbone, there))
    assert (here - away).abs().mean() < 0.02  # single patches may be near ties


def test_maps_and_measurements_are_those_of_the_cpu(there, backbone, pair, gap):
    picture = pair[0]
    for compute in (
        lambda vit: pca([vit.features(picture.to(vit.device), size=112)])[0].image((50, 50)),
        lambda vit: similarity_map(picture, (0.4, 0.4), vit, pair[1], short_patches=8).mask((50, 50)),
        lambda vit: attention_map(picture, vit, size=112).heat(),
    ):
        assert gap(compute(there).cpu(), compute(backbone)) < 1e-2
    here, away = (measure(*pair, pair[0], vit) for vit in (backbone, there))
    assert away.structure_distance == pytest.approx(here.structure_distance, abs=1e-5)
    assert away.appearance_distance == pytest.approx(here.appearance_distance, rel=1e-3)


@pytest.mark.parametrize("facet", ["cls", "key"])
def test_inversion_learns(there, pair, facet):
    run = Inversion(pair[0], there, inversion_preset("fast", size=112, steps=40), facet=facet)
    losses = [step.total.item() for step in run]
    assert losses[-1] < losses[0] / 2
    assert run.image().device.type == "cuda"


def test_large_pictures_are_rendered_as_whole_ones(pair, gap):
    generator, picture = Generator().cuda(), pair[0].cuda()
    assert gap(render(generator, picture, whole_pixels=0), render(generator, picture)) < 1e-4


def test_what_does_not_fit_the_device_is_rendered_on_the_cpu(pair, gap, caplog):
    generator, picture = Generator(), resize(pair[0], (1000, 1300))
    expected = render(generator, picture)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(100e6 / torch.cuda.get_device_properties(0).total_memory)
    try:
        result = render_anywhere(generator.cuda(), picture.cuda())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (len(caplog.messages), result.device.type) == (1, "cuda")
    assert "the CPU renders the picture" in caplog.messages[0]
    assert next(generator.parameters()).device.type == "cuda"
    assert gap(result.cpu(), expected) < 1e-5


def test_lack_of_memory_is_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**48, device="cuda")
    assert is_out_of_memory(raised.value)


def test_the_result_of_a_run_that_does_not_fit_is_rendered_on_the_cpu_once(pair, there, gap, caplog):
    run = Transfer(resize(pair[0], (1000, 1300)), pair[1], there, preset("paper", size=64, vit_size=56, steps=1))
    for _ in run:
        pass
    expected = run.image()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(100e6 / torch.cuda.get_device_properties(0).total_memory)
    try:
        result = render_result(run)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("out of memory for the result at full size on cuda")
    assert gap(result, expected.cpu()) < 1e-4
