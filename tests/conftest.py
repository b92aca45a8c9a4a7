"""Shared fixtures: the real backbone, tiny random ones, the demo pair, and the command line."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as memoize
from functools import partial
from pathlib import Path

# Most tensors here are tiny, so that threads would wait for each other more than they compute: the cores are for the
# test processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    """Makes one weights cache for all test processes and their children; one that the caller chose is kept."""
    if not hasattr(config, "workerinput") and not os.environ.get("SPLICE_CACHE"):
        folder = tempfile.TemporaryDirectory(prefix="splice-cache-", ignore_cleanup_errors=True)
        os.environ["SPLICE_CACHE"] = folder.name
        config.add_cleanup(folder.cleanup)


@pytest.fixture(scope="session", autouse=True)
def cache():
    """The weights cache, also where a test has another one in the environment."""
    return Path(os.environ["SPLICE_CACHE"])


@pytest.fixture(scope="session")
def weights_file(cache, tmp_path_factory):
    """The file of the real weights, converted by the first test process that needs it."""
    from filelock import FileLock

    from splice_engine import OFFLINE_BACKBONE
    from splice_engine.vit.catalogue import lookup
    from splice_engine.vit.weights import get

    shared = tmp_path_factory.getbasetemp().parent
    with FileLock(shared / "conversion.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPLICE_CACHE", str(cache))
        return get(lookup(OFFLINE_BACKBONE))


@pytest.fixture(scope="session")
def load_real(weights_file):
    """Loads the real backbone on a device and in a precision, once."""
    from splice_engine import Backbone

    load = Backbone.load

    @memoize
    def build(device, dtype):
        return load(weights_file, device, dtype)

    return build


@pytest.fixture(scope="session")
def backbone(load_real):
    """Real weights, in fp32."""
    return load_real("cpu", torch.float32)


@pytest.fixture(scope="session")
def plain_model(weights_file):
    """The real backbone as timm makes it, untouched by the engine."""
    import timm
    from safetensors.torch import load_file

    from splice_engine import CATALOGUE, OFFLINE_BACKBONE

    return timm.create_model(
        CATALOGUE[OFFLINE_BACKBONE].timm_id,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": load_file(weights_file)},
        num_classes=0,
        dynamic_img_size=True,
    ).eval()


@pytest.fixture(scope="session")
def tiny_model():
    """Builds a small timm transformer of a kind, with weights strong enough to tell right from wrong."""
    from timm.layers import SwiGLUPacked
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

    size = {"embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 0, "dynamic_img_size": True}
    vit = partial(VisionTransformer, img_size=56, patch_size=14, **size)
    # As timm's vit_*_patch16_dinov3 call it.
    dinov3 = partial(
        Eva,
        img_size=64,
        patch_size=16,
        init_values=0.5,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        num_reg_tokens=4,
        use_fc_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        **size,
    )
    builders = {
        "dino": vit,
        "dinov2": partial(vit, init_values=0.5),
        "dinov2_reg": partial(vit, init_values=0.5, reg_tokens=4, no_embed_class=True),
        "dinov2_swiglu": partial(
            vit, init_values=0.5, mlp_ratio=2.66667 * 2, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU
        ),
        "dinov3": partial(dinov3, qkv_bias=False),
        "dinov3_qkvb": partial(dinov3, qkv_bias=True),
        "dinov3_plus": partial(dinov3, qkv_bias=False, swiglu_mlp=True, swiglu_align_to=8),
        "dinov3_plus_qkvb": partial(dinov3, qkv_bias=True, swiglu_mlp=True, swiglu_align_to=8),
        "dinov3_unfused": partial(dinov3, qkv_bias=True, qkv_fused=False),
    }

    def build(kind="dinov2", seed=0):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = builders[kind]()
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return build


@pytest.fixture(scope="session")
def tiny(tiny_model):
    """Builds a Backbone around a tiny model."""
    from splice_engine import Backbone

    def build(kind="dinov2", seed=0, **options):
        return Backbone(tiny_model(kind, seed), f"tiny_{kind}", **options)

    return build


@pytest.fixture(scope="session")
def demo_pair():
    from splice_engine.cli.demo import load_pair

    return load_pair()


@pytest.fixture(scope="session")
def pair(demo_pair):
    """The demo pair, small and of two different shapes that no patch size divides."""
    from splice_engine.images import resize

    structure, appearance = demo_pair
    return resize(structure, (97, 123)), resize(appearance, (118, 99))


@pytest.fixture
def coarse_matching(monkeypatch):
    """Matches six patches along the short side, a tenth of the work: where it does not matter how well."""
    from splice_engine import InstantMixture, InstantTransfer

    for kind in (InstantMixture, InstantTransfer):
        monkeypatch.setattr(kind, "between", staticmethod(partial(kind.between, short_patches=6)))


@pytest.fixture(scope="session")
def plain():
    """The module with a plain rendering of the paper's step."""
    location = importlib.util.spec_from_file_location("plain", ROOT / "benchmarks" / "plain.py")
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def gap():
    """Largest difference of two tensors, relative to the largest entry of the second."""

    def measure(got, expected):
        assert got.shape == expected.shape
        return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()

    return measure


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def complaint(self) -> list[str]:
        """Lines on stderr, without the usage lines that argparse prints before its own message."""
        return [line for line in re.sub(r"\Ausage: .*?\n(?=\S)", "", self.err, flags=re.S).splitlines() if line]


@pytest.fixture
def splice(capsys, monkeypatch, request):
    """Runs one command line in this process; warnings count as words on stderr, where Python writes them.

    Commands share one build of the real backbone.
    """
    from splice_engine import OFFLINE_BACKBONE, Backbone
    from splice_engine.cli.main import main

    load = Backbone.load

    def load_once(name_or_path, device="cpu", dtype=torch.float32, **options):
        if str(name_or_path) == OFFLINE_BACKBONE:
            return request.getfixturevalue("load_real")(str(device), dtype)
        return load(name_or_path, device, dtype, **options)

    monkeypatch.setattr(Backbone, "load", load_once)

    def run(*arguments):
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", category)  # as outside of tests
            try:
                status = main([str(argument) for argument in arguments])
            except SystemExit as stop:  # how argparse ends on a bad option
                status = stop.code
        printed = capsys.readouterr()
        return Outcome(status, printed.out, printed.err + "".join(f"{warning.message}\n" for warning in caught))

    return run


@pytest.fixture(scope="session")
def start(cache, weights_file):
    """Starts one command line as a process of its own, which finds the real weights."""

    def run(*arguments, **options):
        environment = {**os.environ, "SPLICE_CACHE": str(cache), **options.pop("env", {})}
        return subprocess.Popen(
            [sys.executable, "-m", "splice_engine.cli", *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    return run


@pytest.fixture(scope="session")
def process(start):
    """Runs one command line as a process of its own, to its end."""

    def run(*arguments, **options):
        with start(*arguments, **options) as child:
            out, err = child.communicate(timeout=300)
            return Outcome(child.returncode, out, err)

    return run


@pytest.fixture
def limit_file_size():
    """A block in which neither this process nor its children write more than so many bytes to a file: a full disk."""
    resource = pytest.importorskip("resource", reason="no limits on this system")

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def count_passes():
    """Counts the passes that a ViT or a generator takes from now on: a list with the height and width of each."""
    hooks = []

    def watch(module):
        sizes = []
        hooks.append(module.register_forward_hook(lambda _module, given, _output: sizes.append(given[0].shape[-2:])))
        return sizes

    yield watch
    for hook in hooks:
        hook.remove()
