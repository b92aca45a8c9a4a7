"""Semantic matching and the instant transfer, with real weights."""

from dataclasses import replace

import pytest
import skimage.data
import torch
import torch.nn.functional as F

from splice_engine import Correspondence, InstantSettings, InstantTransfer, SpliceError, Transfer, preset
from splice_engine.images import resize
from splice_engine.matching import correspondence

ONCE = InstantSettings(match_passes=1)


@pytest.fixture(scope="module")
def pair(demo_pair):
    return resize(demo_pair[0], (224, 224)), resize(demo_pair[1], (280, 224))


def grid_of(match):
    height, width = match.source_grid
    return torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")


def test_a_picture_matches_itself_patch_by_patch(backbone, pair):
    match = Correspondence.between(pair[1], pair[1], backbone, short_patches=16)
    rows, columns = grid_of(match)
    for radius in (0, 2):
        row, column = match.matches(radius)
        assert ((row == rows) & (column == columns)).float().mean() >= 0.99


def test_a_picture_matches_its_mirror_image_mirrored(backbone, pair):
    match = Correspondence.between(pair[1], pair[1].flip(-1), backbone, short_patches=16)
    rows, columns = grid_of(match)
    row, column = match.matches()
    assert ((row == rows) & (column == match.target_grid[1] - 1 - columns)).float().mean() >= 0.99


def test_a_place_near_to_everything_does_not_take_the_match_of_what_is_special():
    fur, nose = F.normalize(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    source = torch.cat([fur.repeat(15, 1), F.normalize(fur + nose, dim=0)[None]])  # the fur around shows in the nose
    target = F.normalize(torch.stack([fur, fur + 0.2 * nose, fur, nose]), dim=-1)
    match = Correspondence(source, target, (1, 16), (1, 4))
    assert match.source[15] @ target[1] > match.source[15] @ target[3]  # as they are, the fur is nearer
    assert match.matches()[1, 0, 15] == 3
    assert 3 not in match.matches()[1, 0, :15]


def test_of_two_cats_the_one_that_looks_the_other_way_is_matched_mirrored(backbone):
    cat = resize(torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1)[None] / 255, (224, 224))
    match = Correspondence.between(torch.cat([cat, cat.flip(-1)], dim=-1), cat, backbone, short_patches=16)
    mirrored = match.matches(1, mirror=True)[1] >= match.target_grid[1]
    assert not mirrored[:, :14].any()
    assert mirrored[:, -14:].all()


def test_where_neither_is_better_the_mirror_image_is_matched_in_whole_regions(backbone):
    grass = torch.from_numpy(skimage.data.grass())[None, None].expand(1, 3, -1, -1) / 255
    match = Correspondence.between(grass[..., :256, :256], grass[..., 256:, 256:], backbone, short_patches=16)
    mirrored = (match.matches(1, mirror=True)[1] >= match.target_grid[1]).float()
    assert mirrored.diff(dim=1).abs().mean() < 0.1


def test_coherence_makes_neighbours_match_neighbours(backbone, pair):
    match = Correspondence.between(*pair, backbone, short_patches=16)

    def jumps(radius):
        steps = match.matches(radius).diff(dim=2).float()
        return (steps - torch.tensor([0.0, 1.0]).view(2, 1, 1)).abs().sum(dim=0).gt(1).float().mean()

    assert jumps(2) < 0.75 * jumps(0)


@pytest.mark.parametrize("density", [1, 2])
def test_similarities_are_means_over_neighbours_in_either_order(density):
    """Also where the neighbours reach past both sides of the picture."""
    grids, radius, steps = ((6, 3), (5, 4)), 2, (-2, -1, 0, 1, 2)
    source, target = (
        F.normalize(torch.randn(height * width, 8, generator=torch.Generator().manual_seed(height)), dim=-1)
        for height, width in grids
    )
    match = Correspondence(source, target, *grids, density=density)
    cosines = (source @ target.T).view(*grids[0], *grids[1])

    def mean(cell, place, sign):
        """Over rows, then over columns, of those that both pictures have."""
        rows, columns = (
            [
                (own + step * density, other + sign * step * density)
                for step in steps
                if 0 <= own + step * density < grids[0][axis] and 0 <= other + sign * step * density < grids[1][axis]
            ]
            for axis, (own, other, sign) in enumerate(((cell[0], place[0], 1), (cell[1], place[1], sign)))
        )
        return sum(cosines[r, c, k, m] for r, k in rows for c, m in columns) / (len(rows) * len(columns))

    for cell in ((0, 0), (4, 1)):
        selected = torch.zeros(1, 1, *grids[0])
        selected[0, 0, cell[0], cell[1]] = 1
        found = match.similarity(selected, radius)[0, 0]
        for row in range(5):
            for column in range(4):
                expected = max(mean(cell, (row, column), sign) for sign in (1, -1))
                assert found[row, column] == pytest.approx(expected.item(), abs=1e-5)


def test_refining_finds_parts_that_the_first_match_mixed_up(backbone):
    picture = torch.from_numpy(skimage.data.coffee()).permute(2, 0, 1)[None] / 255
    negative = 1 - picture
    match = Correspondence.between(picture, negative, backbone, short_patches=16)
    painted = InstantTransfer.between(picture, negative, backbone, ONCE, short_patches=16).painted(256)

    def found(match):
        rows, columns = grid_of(match)
        row, column = match.matches()
        return (((row - rows).abs() <= 1) & ((column - columns).abs() <= 1)).float().mean()

    assert found(match.refine(painted, backbone)) > found(match) + 0.1


def test_a_second_pass_matches_what_the_first_painted(backbone, pair):
    negative = 1 - pair[0]
    once, twice = (
        InstantTransfer.between(pair[0], negative, backbone, settings, short_patches=16).image()
        for settings in (ONCE, InstantSettings(match_passes=2))
    )
    assert (twice - negative).abs().mean() < 0.95 * (once - negative).abs().mean()


@pytest.mark.parametrize("few", [{"BAND_ENTRIES": 16 * 320 * 7}, {"WHOLE_ENTRIES": 0, "CHUNK_ENTRIES": 16 * 320 * 7}])
def test_few_similarities_at_a_time_give_the_same(few, backbone, pair, monkeypatch):
    match = Correspondence.between(*pair, backbone, short_patches=16)
    values = torch.rand(1, 3, *match.target_grid)
    whole = match.matches(2), match.warp(values)
    for name, entries in few.items():
        monkeypatch.setattr(correspondence, name, entries)
    assert torch.equal(match.matches(2), whole[0])
    torch.testing.assert_close(match.warp(values), whole[1])


def test_warped_values_stay_among_the_values(backbone, pair):
    match = Correspondence.between(*pair, backbone, short_patches=16)
    warped = match.warp(torch.full((1, 2, *match.target_grid), 0.3))
    assert warped.shape == (1, 2, *match.source_grid)
    torch.testing.assert_close(warped, torch.full_like(warped, 0.3))


def test_a_picture_in_its_own_colours_is_itself(backbone, pair):
    painted = InstantTransfer.between(pair[0], pair[0], backbone, ONCE, short_patches=16).image()
    assert (painted - pair[0]).abs().mean() < 0.04


SUIT, BACKGROUND = (slice(140, 200), slice(20, 60)), (slice(10, 60), slice(130, 150))


def test_the_demo_gets_the_admirals_colours(backbone, pair):
    structure, appearance = pair
    painted = InstantTransfer.between(structure, appearance, backbone, short_patches=16).image()
    assert painted.shape == structure.shape
    suit, background = (painted[0, :, rows, columns].mean(dim=(1, 2)) for rows, columns in (SUIT, BACKGROUND))
    assert suit.max() < 0.45  # navy, where it was bright orange
    assert background[2] > background[0] + 0.1  # blue, where it was grey


@pytest.mark.parametrize("size", [(300, 200), (64, 500), (65, 67)])
def test_any_size_is_painted_at_full_size(size, backbone, pair):
    instant = InstantTransfer.between(resize(pair[0], size), pair[1], backbone, ONCE, short_patches=8)
    assert instant.image().shape[-2:] == size
    assert min(instant.image(size=96).shape[-2:]) == 96


def test_texture_is_a_share(backbone, pair):
    """What it adds grows with it, and without it the picture has only A's own detail."""
    settings = (InstantSettings(match_passes=1, texture=texture) for texture in (0, 0.5, 1))
    none, half, whole = (InstantTransfer.between(*pair, backbone, each, short_patches=8).painted() for each in settings)
    some, all_of_it = ((picture - none).abs().mean() for picture in (half, whole))
    assert 0.005 < some < all_of_it


def test_texture_is_as_sharp_as_the_exemplar_at_any_size(backbone, demo_pair):
    """A picture that is three times as large shows detail of B that the matching never got."""
    structure, appearance = (resize(picture, (336, 336)) for picture in demo_pair)
    fine = appearance + 0.2 * torch.randn(appearance.shape, generator=torch.Generator().manual_seed(0))
    smooth = resize(resize(appearance, (112, 112)), (336, 336))
    sharp, soft = (
        InstantTransfer.between(structure, b.clamp(0, 1), backbone, ONCE, short_patches=7).image()
        for b in (fine, smooth)
    )
    assert sharp.shape == structure.shape
    contrast = [(picture - resize(resize(picture, (112, 112)), (336, 336))).std() for picture in (sharp, soft)]
    assert contrast[0] > 1.5 * contrast[1]


def test_edges_that_only_colours_have_hold_what_is_painted(backbone):
    """An orange disc on green of the same brightness, in the colours of a yellow one on blue."""
    rows, columns = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")

    def paint(is_disc, disc, ground):
        noise = torch.randn(224, 224, generator=torch.Generator().manual_seed(0))
        colours = torch.where(is_disc, torch.tensor(disc).view(3, 1, 1), torch.tensor(ground).view(3, 1, 1))
        return (colours + 0.02 * noise).clamp(0, 1)[None]

    is_disc = (rows - 104) ** 2 + (columns - 124) ** 2 < 61**2
    structure = paint(is_disc, (0.8, 0.3, 0.2), (0.2, 0.55, 0.5))
    appearance = paint((rows - 112) ** 2 + (columns - 112) ** 2 < 80**2, (0.95, 0.85, 0.3), (0.1, 0.1, 0.4))
    painted = InstantTransfer.between(structure, appearance, backbone, ONCE, short_patches=16).image()
    assert ((painted[0, 0] > 0.5) != is_disc).float().mean() < 0.008


def test_an_outline_is_where_gravel_meets_bricks(backbone):
    """However much either of them varies."""
    gravel, bricks = (torch.from_numpy(each())[None, None] / 255 for each in (skimage.data.gravel, skimage.data.brick))
    picture = torch.cat([gravel[..., :256], bricks[..., 256:]], dim=-1).expand(1, 3, -1, -1)
    outlines = InstantTransfer.between(picture, picture, backbone, ONCE).regions[:, :1]
    left, seam, right = (outlines[..., first:last].mean() for first, last in ((0, 90), (106, 118), (134, 224)))
    assert seam > 0.6
    assert max(left, right) < 0.2


@pytest.mark.parametrize(("own", "given", "kept"), [(0.06, 0.5, False), (0.3, 0.3, True)])
def test_texture_gives_way_to_detail_of_as_much_contrast(own, given, kept, tiny):
    """A zebra's stripes are laid over the shades of a coat, a wall's plaster is not laid over a face."""
    rng = torch.Generator().manual_seed(0)
    noise, other = (torch.rand(1, 1, 224, 224, generator=rng).expand(1, 3, -1, -1) - 0.5 for _ in range(2))
    settings = InstantSettings(density=1, texture=1.0)
    transfer = InstantTransfer.between(0.5 + own * noise, 0.5 + given * other, tiny(), settings)
    result = transfer.image()
    assert torch.equal(transfer.image(), result)
    correlation = torch.corrcoef(torch.stack([noise[0, 0].flatten(), result[0].mean(dim=0).flatten()]))[0, 1]
    assert correlation > 0.9 if kept else correlation < 0.3


def test_in_the_background_the_detail_of_a_gives_way(tiny):
    """A meadow gets the flowers of B, which A's grass would bury."""
    rng = torch.Generator().manual_seed(0)
    grass, flowers = (torch.rand(1, 1, 224, 224, generator=rng).expand(1, 3, -1, -1) - 0.5 for _ in range(2))
    settings = InstantSettings(density=1, texture=1.0)
    transfer = InstantTransfer.between(0.5 + 0.3 * grass, 0.5 + 0.5 * flowers, tiny(), settings)

    def kept(is_background):
        regions = torch.zeros_like(transfer.regions)
        regions[:, 1] = is_background
        result = replace(transfer, regions=regions).image()
        return torch.corrcoef(torch.stack([grass[0, 0].flatten(), result[0].mean(dim=0).flatten()]))[0, 1]

    assert kept(is_background=1) < 0.3 < 0.6 < kept(is_background=0)


def test_a_blurred_backdrop_gets_no_grain_from_the_seams_of_its_patches(backbone):
    def backdrop(seed):
        colours = torch.rand(1, 3, 10, 10, generator=torch.Generator().manual_seed(seed))
        return F.interpolate(colours, (224, 224), mode="bicubic").clamp(0, 1)

    def grain(picture):
        return (picture - F.avg_pool2d(picture, 3, 1, 1, count_include_pad=False)).std()

    structure, appearance = backdrop(0), backdrop(1)
    result = InstantTransfer.between(structure, appearance, backbone, ONCE, short_patches=16).image()
    assert grain(result) < 2.2 * grain(appearance)  # 3 times with the seams as they are


def test_texture_whose_patches_fit_is_laid_as_it_is(backbone):
    gravel = torch.from_numpy(skimage.data.gravel())[None, None].expand(1, 3, -1, -1) / 255
    here, there = gravel[..., :224, :224], gravel[..., 280:504, 280:504]
    assert InstantTransfer.between(here, there, backbone, ONCE, short_patches=16).gain.mean() > 0.97


def test_what_is_dark_in_the_dark_still_shows_where_the_picture_gets_bright(tiny):
    """An eye in dark fur, when the fur becomes white."""
    rng = torch.Generator().manual_seed(0)
    fur, white = (torch.rand(1, 1, 224, 224, generator=rng).expand(1, 3, -1, -1) - 0.5 for _ in range(2))
    structure, appearance = 0.2 + 0.06 * fur, 0.75 + 0.5 * white
    structure[..., 100:108, 100:108] -= 0.12
    transfer = InstantTransfer.between(structure, appearance, tiny(), InstantSettings(density=1))
    spots = resize(transfer.spots, (224, 224))
    assert spots[..., 104, 104] > 0.9
    assert spots.mean() < 0.02  # tufts of fur are none
    result = transfer.image()
    around, inside = result[..., 90:118, 90:118].mean(), result[..., 102:106, 102:106].mean()
    assert inside < 0.5 * around


@pytest.mark.parametrize("colour", [(0.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.9, 0.2, 0.1)])
def test_pictures_of_one_colour_are_no_trouble(colour, backbone, pair):
    flat = torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 120, 160).contiguous()
    painted = InstantTransfer.between(pair[0], flat, backbone, ONCE, short_patches=8).image()
    grey = painted.mean(dim=1).mean()
    assert torch.isfinite(painted).all()
    assert abs(grey - flat.mean()) < 0.1
    assert torch.isfinite(InstantTransfer.between(flat, pair[1], backbone, ONCE, short_patches=8).image()).all()


def test_a_broken_picture_is_refused(backbone, pair):
    with pytest.raises(SpliceError, match="not numbers"):
        InstantTransfer.between(pair[0] * float("nan"), pair[1], backbone)


@pytest.mark.usefixtures("coarse_matching")
def test_the_warm_start_learns_the_matched_image_without_the_vit(backbone, pair, count_passes):
    run = Transfer(*pair, backbone, preset("draft", size=96, warm_steps=40, steps=1, match_passes=1, residual=0.0))
    before = (run.image(size=96) - run.pair.matched).abs().mean()
    passes = count_passes(backbone)
    for step in run:
        assert set(step.losses) <= {"matched_l1", "reconstruction"}
        if run.step == 40:
            break
    assert passes == []
    assert (run.image(size=96) - run.pair.matched).abs().mean() < 0.6 * before
