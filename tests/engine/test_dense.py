"""Features on a grid finer than the patches."""

import pytest
import torch

from splice_engine import Correspondence, SpliceError, dense_features
from splice_engine.images import resize
from splice_engine.vit.backbone import Request
from splice_engine.vit.dense import extract_dense

KINDS = ("dino", "dinov2", "dinov2_reg", "dinov3")


@pytest.fixture
def picture():
    return torch.rand(2, 3, 112, 144, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("facet", ["token", "key"])
def test_a_density_of_one_is_the_plain_grid(kind, facet, tiny, picture):
    backbone = tiny(kind)
    dense, plain = dense_features(picture, backbone, 1, facet, 64, 1), backbone.features(picture, 1, facet, 64)
    assert dense.grid == plain.grid
    assert torch.equal(dense.tokens, plain.tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [2, 4])
def test_the_cells_are_those_of_shifted_pictures(kind, density, tiny, picture, gap):
    """Where nothing is reflected, each cell is what a plain pass reads of the picture moved to it."""
    backbone = tiny(kind)
    side = 4 * backbone.patch
    inside = picture[..., 16 : 16 + side, 16 : 16 + side]
    dense = dense_features(inside, backbone, 0, "value", None, density)
    assert dense.grid == (4 * density, 4 * density)
    assert dense.prefix.shape[1] == backbone.prefix
    cells = dense.tokens.unflatten(1, dense.grid)
    stride = backbone.patch / density
    for row, column in ((0, density - 1), (density - 1, 0)):
        at = [int(((step - (density - 1) / 2) * stride + 0.5) // 1) for step in (row, column)]
        moved = picture[..., 16 + at[0] : 16 + at[0] + side, 16 + at[1] : 16 + at[1] + side]
        plain = backbone.features(moved, 0, "value").tokens.unflatten(1, (4, 4))
        assert gap(cells[:, row::density, column::density][:, 1:3, 1:3], plain[:, 1:3, 1:3]) < 1e-5


@pytest.mark.parametrize("density", [2, 4])
def test_half_of_the_cells_may_be_means_of_the_others(density, tiny, picture):
    backbone, request = tiny(), Request(1, "token")
    side = 4 * backbone.patch
    inside = picture[..., :side, : 2 * side]
    every = extract_dense(inside, backbone, [request], density)[request]
    half = extract_dense(inside, backbone, [request], density, every_second=True)[request]
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in half.shape[1:3]), indexing="ij")
    black = (rows + columns) % 2 == 0
    assert torch.equal(half[:, black], every[:, black])
    for row, column in ((5, 6), (6, 5)):
        neighbours = [
            half[:, row - 1, column],
            half[:, row + 1, column],
            half[:, row, column - 1],
            half[:, row, column + 1],
        ]
        torch.testing.assert_close(half[:, row, column], torch.stack(neighbours).mean(dim=0))
    torch.testing.assert_close(half[:, 0, 1], (half[:, 0, 0] + half[:, 0, 2]) / 4 + half[:, 1, 1] / 2)


def test_what_has_no_finer_grid_is_refused(tiny, picture):
    with pytest.raises(SpliceError, match="density must be one of 1, 2, 4, not 3"):
        dense_features(picture, tiny(), density=3)
    with pytest.raises(SpliceError, match="unknown facet"):
        dense_features(picture, tiny(), facet="cls")


@pytest.mark.parametrize("density", [1, 2])
def test_matches_of_a_dense_grid_are_finer(density, backbone, pair):
    """A picture shifted by half a patch is matched to itself, shifted by one cell of a grid twice as fine."""
    size = (8 * backbone.patch * 2, 10 * backbone.patch * 2)
    whole = resize(pair[0], (size[0], size[1] + backbone.patch))
    left, right = whole[..., : size[1]], whole[..., backbone.patch // 2 : size[1] + backbone.patch // 2]
    match = Correspondence.between(left, right, backbone, short_patches=16, density=density)
    assert match.source_grid == (16 * density, 20 * density)
    column = torch.arange(match.source_grid[1]).expand(match.source_grid)
    steps = (column - match.matches(2)[1]).float()[:, density:-density]
    expected = density / 2  # half a patch
    assert (steps - expected).abs().median() <= (0.5 if density == 1 else 0)


def test_the_mirror_image_is_matched_in_order(backbone, pair):
    """A mirrored picture finds its parts in the mirror image, neighbours beside neighbours."""
    match = Correspondence.between(pair[0].flip(-1), pair[0], backbone, short_patches=16)
    width = match.target_grid[1]
    column = match.matches(2, mirror=True)[1]
    expected = width + torch.arange(width).expand_as(column)
    assert ((column - expected).abs() <= 1).float().mean() > 0.9
    alone = match.matches(2)[1]
    assert alone.max() < width
