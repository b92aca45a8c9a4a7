"""Without the operators that Apple's devices lack, or whose gradients they lack, in the torch that people run."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from splice_engine import InstantSettings, InstantTransfer, Transfer, images, preset, resampling
from splice_engine.vit import backbone

MISSING = "_upsample_bilinear2d_aa"
"""Forward and backward. The bicubic one resamples tables of positions, on the CPU, which is all that is here."""


class AppleOperators(TorchDispatchMode):
    """Refuses what has no MPS kernel: antialiased resizing both ways, and adaptive pooling of uneven windows."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        assert not name.startswith(MISSING), name
        if "adaptive_avg_pool2d" in name and "backward" not in name:
            assert all(side % to == 0 for side, to in zip(args[0].shape[-2:], args[1], strict=True)), args[1]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def apple(monkeypatch):
    for module in (resampling, images, backbone):
        monkeypatch.setattr(module, "lacks_antialiasing", lambda _device: True)
    return AppleOperators


@pytest.mark.parametrize("size", [(24, 40), (31, 17), (9, 80), (120, 33)])
def test_resizing_by_products_is_that_of_torch(size, apple, demo_pair):
    picture = demo_pair[0][..., :61, :83].clone().requires_grad_()
    resized = resampling.resize_bilinear(picture, size)
    expected = F.interpolate(picture, size, mode="bilinear", align_corners=False, antialias=True)
    assert (resized - expected).abs().max() < 1e-5
    weight = torch.rand(resized.shape, generator=torch.Generator().manual_seed(0))
    mine, torchs = (torch.autograd.grad((x * weight).sum(), picture)[0] for x in (resized, expected))
    assert (mine - torchs).abs().max() < 1e-5


@pytest.mark.parametrize("density", [1, 2, 4])
def test_an_instant_transfer_with_masks(density, apple, tiny, demo_pair):
    a, b = demo_pair[0][..., :211, :193], demo_pair[0][..., 200:333, 100:301]
    masks = {"structure_mask": a[:, :1].round(), "appearance_mask": b[:, :1].round()}
    settings = InstantSettings(density=density, match_passes=2)
    expected = InstantTransfer.between(a, b, tiny("dinov2_reg"), settings, **masks, short_patches=6).image()
    with apple():
        result = InstantTransfer.between(a, b, tiny("dinov2_reg"), settings, **masks, short_patches=6).image()
    assert torch.isfinite(result).all()
    assert (result - expected).abs().mean() < 0.05


def test_training_with_all_of_its_steps(apple, tiny, demo_pair):
    a, b = demo_pair[0][..., :101, :93], demo_pair[0][..., 200:333, 100:301]
    settings = preset("draft", warm_steps=2, steps=3, size=64, vit_size=56, jitter=0.5, blur=0.5)
    with apple():
        run = Transfer(a, b, tiny("dinov2_reg"), settings)
        assert [step.index for step in run] == [0, 1, 2, 3, 4]
        assert torch.isfinite(run.image()).all()


@pytest.mark.parametrize("kind", ["dino", "dinov2_reg", "dinov3"])
def test_features_are_the_same_when_positions_are_added_on_the_cpu(kind, tiny, demo_pair, monkeypatch):
    picture = demo_pair[0][..., :84, :140]
    expected = tiny(kind).features(picture)
    monkeypatch.setattr(backbone, "lacks_antialiasing", lambda _device: True)
    assert torch.equal(tiny(kind).features(picture).tokens, expected.tokens)
