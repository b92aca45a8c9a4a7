"""Principal components: exact, repeatable, and similar for similar parts."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA

from splice_engine import SpliceError, pca, self_similarity
from splice_engine.analysis.pca import principal_components
from splice_engine.images import resize
from splice_engine.vit.features import Features


def features_of(tokens, grid):
    nothing = torch.zeros(len(tokens), 1, tokens.shape[-1])
    return Features(nothing[:, 0], tokens, nothing, grid, 0, "key", "none")


@pytest.fixture(scope="module")
def noise():
    """Features of two batches with grids of different shapes."""
    rng = torch.Generator().manual_seed(0)
    scale = torch.linspace(3, 0.5, 20)
    grids = ((2, 4, 6), (1, 5, 3))
    return [features_of(torch.randn(b, h * w, 20, generator=rng) * scale + 1, (h, w)) for b, h, w in grids]


def flat(components):
    """Scores of all patches, `[N, C]`, in the order of the features."""
    return torch.cat([entry.scores.flatten(2).transpose(1, 2).flatten(0, 1) for entry in components])


def same_up_to_sign(got, expected):
    expected = torch.as_tensor(expected, dtype=got.dtype)
    signs = (got * expected).sum(dim=0).sign()
    torch.testing.assert_close(got, expected * signs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [3, 7])
def test_scikit_learn_finds_the_same(count, noise):
    rows = torch.cat([entry.tokens.flatten(0, 1) for entry in noise]).double()
    same_up_to_sign(flat(pca(noise, count)), PCA(count, svd_solver="full").fit_transform(rows.numpy()))


def test_components_of_the_self_similarity_rows_are_those_of_the_whole_matrix(noise):
    """The engine never makes that matrix."""
    unit = F.normalize(torch.cat([entry.tokens.flatten(0, 1) for entry in noise]).double(), dim=-1)
    expected = PCA(4, svd_solver="full").fit_transform((unit @ unit.T).numpy())
    same_up_to_sign(flat(pca(noise, 4, self_similarity=True)), expected)


def test_of_one_picture_it_is_the_papers_matrix(noise):
    entry = noise[1]
    matrix = self_similarity(entry)[0, 1:, 1:]
    expected = PCA(3, svd_solver="full").fit_transform(matrix.double().numpy())
    same_up_to_sign(flat(pca([entry], self_similarity=True)), expected)


def test_signs_do_not_depend_on_luck():
    rows = torch.randn(60, 8, generator=torch.Generator().manual_seed(1)).double() * torch.arange(8, 0, -1)
    scores, directions, mean = principal_components(rows, 3)
    again = principal_components(rows.flip(0), 3)[0].flip(0)
    torch.testing.assert_close(scores, again)
    assert (scores.amax(dim=0) >= -scores.amin(dim=0)).all()
    torch.testing.assert_close(principal_components(-rows, 3)[0].abs(), scores.abs())
    torch.testing.assert_close((rows - mean) @ directions.T, scores)


def test_no_outlier_takes_the_colours_away(noise):
    tokens = noise[0].tokens.clone()
    before = pca([noise[0]])[0].colours
    assert (before.amin(dim=(0, 2, 3)), before.amax(dim=(0, 2, 3))) == (pytest.approx([0] * 3), pytest.approx([1] * 3))
    tokens = tokens.repeat(8, 1, 1)
    tokens[0, 0] *= 100
    assert pca([features_of(tokens, noise[0].grid)])[0].colours.std() > 0.5 * before.std()


def test_smooth_and_blocky_pictures_have_any_size(noise):
    components = pca(noise)[0]
    blocks = components.image((40, 60), smooth=False)
    torch.testing.assert_close(blocks[..., ::10, ::10], components.colours)
    assert torch.equal(blocks[..., :10, :10], blocks[..., :1, :1].expand(2, 3, 10, 10))
    smooth = components.image((41, 59))
    assert smooth.shape == (2, 3, 41, 59)
    assert (smooth.min() >= 0, smooth.max() <= 1) == (True, True)
    assert smooth.diff(dim=-1).abs().max() < blocks.diff(dim=-1).abs().max()
    assert components.image((2, 3)).shape == (2, 3, 2, 3)


@pytest.fixture(scope="module")
def mirrored(backbone, demo_pair):
    astronaut = resize(demo_pair[0], (280, 280))
    with torch.no_grad():
        return backbone.features(torch.cat([astronaut, astronaut.flip(-1)]))


@pytest.mark.parametrize("self_similar", [False, True])
def test_similar_parts_get_similar_colours(self_similar, mirrored):
    """A picture and its mirror image, in one batch."""
    colours = pca([mirrored], self_similarity=self_similar)[0].colours
    apart = (colours[0] - colours[1]).abs().mean()
    assert (colours[0] - colours[1].flip(-1)).abs().mean() < 0.5 * apart


def test_a_batch_is_fitted_as_one(mirrored):
    alone = [
        dataclasses.replace(
            mirrored, **{name: getattr(mirrored, name)[index : index + 1] for name in ("cls", "tokens")}
        )
        for index in (0, 1)
    ]
    together = pca([mirrored])[0].scores
    torch.testing.assert_close(torch.cat([entry.scores for entry in pca(alone)]), together)


@pytest.mark.parametrize("self_similar", [False, True])
def test_the_foreground_is_the_object(self_similar, backbone):
    """Whichever it fills more of, and whatever else is in the batch: the border is background."""
    rng = torch.Generator().manual_seed(0)
    tokens = []
    for radius in (3, 6):
        y, x = torch.meshgrid(torch.arange(14.0) - 6.5, torch.arange(16.0) - 7.5, indexing="ij")
        disc = (y.square() + x.square()).sqrt() < radius
        kinds = torch.stack([torch.eye(12)[0], torch.eye(12)[1]]) * 5
        tokens.append(kinds[disc.flatten().long()] + torch.randn(14 * 16, 12, generator=rng))
        expected = disc
    components = pca([features_of(torch.stack(tokens), (14, 16))], self_similarity=self_similar, foreground=True)[0]
    assert ((components.foreground[1, 0] > 0.5) == expected).float().mean() > 0.99
    assert components.foreground[0].mean() < 0.2
    assert torch.equal(
        (components.colours.amax(dim=1, keepdim=True) > 0) & (components.foreground == 0),
        torch.zeros(2, 1, 14, 16, dtype=torch.bool),
    )
    assert components.mask((28, 32)).shape == (2, 1, 28, 32)


def test_the_astronaut_stands_out_from_the_wall(mirrored):
    mask = pca([mirrored], self_similarity=True, foreground=True)[0].mask((280, 280))
    face, wall = mask[0, 0, 40:80, 105:140], mask[0, 0, 5:60, 190:215]
    assert face.mean() > 0.9
    assert wall.mean() < 0.3


@pytest.mark.parametrize(
    ("count", "shape", "message"),
    [(2, (4, 6), "2 components"), (21, (4, 6), "21 components"), (3, (1, 2), "more patches"), (3, None, "nothing")],
)
def test_bad_requests_are_refused(count, shape, message):
    features = [features_of(torch.rand(1, shape[0] * shape[1], 20), shape)] if shape else []
    with pytest.raises(SpliceError, match=message):
        pca(features, count)


def test_pictures_of_one_colour_are_no_trouble(backbone):
    flat_picture = torch.full((1, 3, 112, 140), 0.5)
    with torch.no_grad():
        features = backbone.features(flat_picture)
    for foreground in (False, True):
        assert pca([features], foreground=foreground)[0].image((112, 140)).isfinite().all()
