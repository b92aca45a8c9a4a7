"""The generator, its files, and rendering in bands."""

import pytest
import torch
from safetensors.torch import save_file

from splice_engine import Generator, SpliceError, render
from splice_engine.images import resize, short_side_size

ROUNDING = 1e-3
SIZES = ((64, 64), (65, 64), (97, 123), (118, 99), (127, 128), (131, 257), (64, 512), (33, 35))


def stirred(seed=0, **options):
    """A generator whose output shows its input: the initial weights give nearly flat grey."""
    generator = Generator(seed=seed, **options)
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in generator.named_parameters():
            if name.endswith("conv.weight"):
                weight.mul_(100)
            elif "norm" in name or "merge" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=rng))
            elif name == "output.weight":
                weight.normal_(0, 1, generator=rng)
    return generator


@pytest.fixture(scope="module")
def generator():
    return stirred()


@pytest.fixture(scope="module")
def picture():
    """Waves and noise, so that neither rows nor columns are alike."""

    def make(height, width, seed=0):
        rng = torch.Generator().manual_seed(seed)
        rows, columns = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
        waves = torch.stack([rows.sin(), (columns + rows).cos(), (columns * rows / 9).sin()]) / 2 + 0.5
        return (0.8 * waves + 0.2 * torch.rand(waves.shape, generator=rng))[None]

    return make


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_output_has_the_size_of_the_input(size, generator, picture):
    output = generator(picture(*size))
    assert output.shape == (1, 3, *size)
    assert output.min() >= 0
    assert output.max() <= 1
    assert output.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (97, 123)], ids=str)
def test_a_batch_is_its_pictures_one_by_one(size, generator, picture):
    """Each is normalised by its own statistics, not by those of its neighbours."""
    pictures = torch.cat([picture(*size, seed=0), 0.3 * picture(*size, seed=1)])
    together = generator(pictures)
    apart = torch.cat([generator(pictures[:1]), generator(pictures[1:])])
    assert torch.equal(together, apart)
    assert (together[0] - together[1]).abs().max() > 0.1


@torch.no_grad()
def test_initial_weights_come_from_the_seed_alone(picture):
    x = picture(64, 64)
    torch.manual_seed(1)
    first = Generator(seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, other = Generator(seed=5), Generator(seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(x), second(x))
    assert not torch.equal(first(x), other(x))


def test_every_weight_learns(generator, picture):
    generator.zero_grad()
    generator(picture(97, 123)).square().mean().backward()
    assert [name for name, weight in generator.named_parameters() if not weight.grad.abs().max() > 0] == []


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("size", [(64, 64), (97, 123)], ids=str)
def test_output_and_gradients_are_those_of_a_plain_one(size, plain, picture, gap):
    """A normalisation in the channels-last layout may be right forwards and wrong backwards."""
    generator, reference, x = stirred(), plain.PlainGenerator(), picture(*size)
    reference.copy_weights(generator)
    target = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    outputs = []
    for model in (generator, reference):
        outputs.append(model(x))
        (outputs[-1] - target).square().mean().backward()
    assert gap(outputs[0], outputs[1]) < ROUNDING
    level = reference[0]
    for index in range(len(generator.levels)):
        for part in ("skip", "down", "deep", "up", "mix"):
            ours, theirs = getattr(generator.level(index), part), getattr(level, part)
            for got, expected in ((ours.conv, theirs[1]), (ours.norm, theirs[2])):
                # Not closer: rounding puts some pixels on the other side of LeakyReLU's kink.
                assert relative_error(got.weight.grad, expected.weight.grad) < 0.02
        level = level.below


@torch.no_grad()
def test_save_and_load(tmp_path, picture):
    generator = stirred(seed=3, channels=(8, 16, 24))
    generator.metadata.update(size=96, backbone="dinov2_vits14_saliency")
    generator.save(tmp_path / "g.safetensors", steps=17)
    loaded = Generator.load(tmp_path / "g.safetensors")
    assert loaded.channels == (8, 16, 24)
    assert loaded.metadata == {"size": 96, "backbone": "dinov2_vits14_saliency", "steps": 17}
    assert torch.equal(loaded(picture(97, 123)), generator(picture(97, 123)))
    loaded.save(tmp_path / "again.safetensors")
    assert Generator.load(tmp_path / "again.safetensors").metadata == loaded.metadata


def test_saving_where_it_cannot_be(tmp_path):
    with pytest.raises(SpliceError, match="cannot write"):
        Generator().save(tmp_path / "missing" / "g.safetensors")


def crippled(path):
    """The right head over the wrong tensors."""
    save_file({"a": torch.zeros(3)}, path, {"format": "splice-generator-1", "channels": "[16, 32]", "metadata": "{}"})


def headless(path):
    generator = Generator()
    save_file({name: value.contiguous() for name, value in generator.state_dict().items()}, path)


def with_header(**header):
    tensors = {name: value.contiguous() for name, value in Generator().state_dict().items()}
    return lambda path: save_file(tensors, path, {"format": "splice-generator-1", **header})


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no generator at"),
        (lambda path: path.mkdir(), "no generator at"),
        (lambda path: path.touch(), "cannot be read as a generator"),
        (lambda path: path.write_text("not a generator"), "cannot be read as a generator"),
        (lambda path: torch.save(Generator().state_dict(), path), "cannot be read as a generator"),
        (lambda path: save_file({"a": torch.zeros(3)}, path), "not a saved generator"),
        (headless, "not a saved generator"),
        (crippled, "cannot be read as a generator"),
        (with_header(metadata="{}"), "cannot be read as a generator"),
        (with_header(metadata="{}", channels="16, 32"), "cannot be read as a generator"),
        (with_header(metadata="{}", channels="5"), "cannot be read as a generator"),
        (with_header(metadata="{", channels="[16, 32, 64, 128, 128]"), "cannot be read as a generator"),
    ],
    ids=[
        *("missing", "folder", "empty", "text", "pickle", "other tensors", "no header", "wrong tensors"),
        *("no channels", "broken channels", "one number", "broken metadata"),
    ],
)
def test_files_that_are_no_generators(write, message, tmp_path):
    path = tmp_path / "g.safetensors"
    write(path)
    with pytest.raises(SpliceError, match=message) as refusal:
        Generator.load(path)
    assert str(refusal.value).count(str(path)) == 1
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "size",
    [(64, 64), (128, 96), (129, 65), (255, 64), (256, 70), (257, 75), (333, 257), (641, 200), (200, 641), (385, 33)],
    ids=str,
)
def test_bands_give_what_the_whole_gives(size, generator, picture):
    x = picture(*size)
    whole = render(generator, x, whole_pixels=size[0] * size[1])
    banded = render(generator, x, whole_pixels=0)
    assert banded.shape == whole.shape == x.shape
    assert whole.std() > 0.1
    assert (banded - whole).abs().max() < ROUNDING


@pytest.mark.parametrize("channels", [(8,), (8, 12), (4, 8, 12, 16)])
def test_bands_of_other_depths(channels, picture):
    generator = stirred(channels=channels)
    x = picture(261, 67)
    assert (render(generator, x, whole_pixels=0) - render(generator, x)).abs().max() < ROUNDING


def test_bands_of_a_batch(generator, picture):
    x = torch.cat([picture(140, 66, seed=0), 0.3 * picture(140, 66, seed=1)])
    assert (render(generator, x, whole_pixels=0) - render(generator, x)).abs().max() < ROUNDING


@pytest.mark.parametrize("whole_pixels", [0, 10**9])
@pytest.mark.parametrize("size", [(140, 131), (131, 262)], ids=str)
def test_larger_pictures_have_the_colours_of_the_size_of_training(size, whole_pixels, generator, picture):
    x = picture(*size)
    plain = render(generator, x, whole_pixels=whole_pixels)
    assert torch.equal(render(generator, x, size=131, whole_pixels=whole_pixels), plain)
    large = render(generator, x, size=66, whole_pixels=whole_pixels)
    small = short_side_size(*size, 66)
    wanted = generator(resize(x, small))

    def colour_error(output):
        return (resize(output, small) - wanted).abs().mean().item()

    assert colour_error(large) < 0.5 * colour_error(plain)
    assert large.min() >= 0
    assert large.max() <= 1


def test_rendering_leaves_generator_and_picture_alone(generator, picture):
    x = picture(140, 66)
    kept = x.clone()
    weights = [weight.clone() for weight in generator.parameters()]
    assert not render(generator, x, whole_pixels=0).requires_grad
    assert not render(generator, x).requires_grad
    assert torch.equal(x, kept)
    assert all(torch.equal(now, then) for now, then in zip(generator.parameters(), weights, strict=True))
