"""The features, losses and gradients of the authors' own loss code, on one pair of pictures."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from splice_engine import Appearance, Identity, Objective, Pictures, Request, Structure, self_similarity

TERMS = {"appearance": Appearance(), "structure": Structure(), "identity": Identity()}
LOSS = 1e-5
DIRECTION = 1e-3


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parent / "golden.safetensors")


@pytest.fixture(scope="module")
def pictures(golden):
    """The four pictures that the golden losses were computed on."""
    a, b = (golden[name].permute(2, 0, 1)[None].float() / 255 for name in ("structure", "appearance"))
    return {"structure": a, "appearance": b, "output": 0.6 * a + 0.4 * b.flip(-1), "reconstruction": 0.7 * b + 0.3 * a}


def agrees(gradient, expected, norm):
    direction = F.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0)
    return direction > 1 - DIRECTION and gradient.norm().item() == pytest.approx(norm, rel=1e-3)


def test_features(backbone, golden, pictures, gap):
    asked = {"cls_11": Request(11, "cls"), "cls_5": Request(5, "cls"), "keys_11": Request(-1, "key")}
    answer = backbone(pictures["structure"], list(asked.values()))
    assert {name: gap(answer[request][0], golden[name]) < 1e-5 for name, request in asked.items()} == dict.fromkeys(
        asked, True
    )


def test_self_similarity(backbone, golden, pictures, gap):
    features = backbone.features(pictures["structure"], layer=11)
    assert features.grid == (16, 16)
    assert gap(self_similarity(features)[0], golden["self_similarity_11"]) < 1e-5


@pytest.mark.parametrize("name", TERMS)
def test_one_loss(name, backbone, golden, pictures):
    term = TERMS[name]
    output = pictures[term.output].clone().requires_grad_()
    loss = term.loss(backbone, output, pictures[term.target])
    assert loss.item() == pytest.approx(golden[f"{name}_loss"].item(), rel=LOSS)
    (gradient,) = torch.autograd.grad(loss, output)
    assert agrees(gradient, golden[f"{name}_grad"], golden["grad_norms"][list(TERMS).index(name)].item())


def test_all_losses_in_one_call(backbone, golden, pictures):
    pictures = {name: picture.clone().requires_grad_() for name, picture in pictures.items()}
    objective = Objective(TERMS.values(), backbone)
    losses = objective.losses(Pictures(**pictures))
    assert losses.keys() == TERMS.keys()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(golden[f"{name}_loss"].item(), rel=LOSS)
    objective.total(losses).backward()
    wanted = 10 * golden["appearance_grad"] + golden["structure_grad"]
    assert agrees(pictures["output"].grad, wanted, wanted.norm().item())
    wanted = golden["identity_grad"]
    assert agrees(pictures["reconstruction"].grad, wanted, wanted.norm().item())
