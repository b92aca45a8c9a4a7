"""A plain rendering of the paper's training step, as the measure for ours.

Written the obvious way: the ViT is called once for every feature that a loss needs, in full, with hooks, and its
weights keep `requires_grad`. Only the mathematics is the same as in `splice_engine`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainConv(nn.Sequential):
    """Reflection padding, convolution, batch normalisation (of a batch of one), LeakyReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            nn.ReflectionPad2d(kernel // 2),
            nn.Conv2d(inputs, outputs, kernel, stride),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(0.2),
        )


class PlainLevel(nn.Module):
    def __init__(self, inputs: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        width, *deeper = channels
        self.skip = PlainConv(inputs, 4, 1)
        self.down = PlainConv(inputs, width, 3, 2)
        self.deep = PlainConv(width, width, 3)
        self.below = PlainLevel(width, tuple(deeper)) if deeper else nn.Identity()
        merged = 4 + (deeper[0] if deeper else width)
        self.merge = nn.BatchNorm2d(merged)
        self.up = PlainConv(merged, width, 3)
        self.mix = PlainConv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.skip(x)
        below = F.interpolate(self.below(self.deep(self.down(x))), scale_factor=2, mode="bilinear")
        below = below[:, :, : skip.shape[2], : skip.shape[3]]
        return self.mix(self.up(self.merge(torch.cat([skip, below], dim=1))))


class PlainGenerator(nn.Sequential):
    def __init__(self, channels: tuple[int, ...] = (16, 32, 64, 128, 128), inputs: int = 3) -> None:
        super().__init__(PlainLevel(inputs, channels), nn.Conv2d(channels[0], 3, 1), nn.Sigmoid())

    def copy_weights(self, generator: nn.Module) -> None:
        """Takes over the weights of a `splice_engine` generator."""
        level = self[0]
        state = dict(generator.state_dict())
        with torch.no_grad():
            for index in range(len(generator.levels)):
                for part in ("skip", "down", "deep", "up", "mix"):
                    block = getattr(level, part)
                    block[1].weight.copy_(state[f"levels.{index}.{part}.conv.weight"])
                    block[1].bias.zero_()
                    for kind in ("weight", "bias"):
                        getattr(block[2], kind).copy_(state[f"levels.{index}.{part}.norm.{kind}"])
                for kind in ("weight", "bias"):
                    getattr(level.merge, kind).copy_(state[f"levels.{index}.merge.{kind}"])
                level = level.below
            self[1].load_state_dict({kind: state[f"output.{kind}"] for kind in ("weight", "bias")})


class PlainViT:
    """A timm ViT of which one block is read with hooks, one feature a call; all others run too."""

    def __init__(self, model: nn.Module, size: int = 224, layer: int = -1) -> None:
        self.model = model.eval().requires_grad_(True)
        self.size = size
        self.block = model.blocks[layer]
        self.seen: Tensor | None = None

    def cls(self, picture: Tensor) -> Tensor:
        return self._run(self.block, picture)[:, 0]

    def keys(self, picture: Tensor) -> Tensor:
        return self._run(self.block.attn.qkv, picture).chunk(3, dim=-1)[1]

    def self_similarity(self, picture: Tensor) -> Tensor:
        keys = self.keys(picture)
        norms = keys.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        return (keys @ keys.mT) / (norms @ norms.mT)

    def _run(self, module: nn.Module, picture: Tensor) -> Tensor:
        def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.seen = output

        hook = module.register_forward_hook(keep)
        shrinks = picture.shape[-1] > self.size
        picture = F.interpolate(picture, (self.size, self.size), mode="bilinear", antialias=shrinks)
        mean = picture.new_tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        std = picture.new_tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        self.model((picture - mean) / std)
        hook.remove()
        assert self.seen is not None
        return self.seen


class PlainStep:
    """One step on square crops a and b, on the ViT's device: six forwards of the ViT, three of them with gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.vit = PlainViT(model)
        self.generator = PlainGenerator().to(next(model.parameters()).device)
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=2e-3, betas=(0.0, 0.99))

    def __call__(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        output, reconstruction = self.generator(a), self.generator(b)
        with torch.no_grad():
            target_cls, target_similarity, target_keys = self.vit.cls(b), self.vit.self_similarity(a), self.vit.keys(b)
        losses = {
            "appearance": F.mse_loss(self.vit.cls(output), target_cls),
            "structure": F.mse_loss(self.vit.self_similarity(output), target_similarity),
            "identity": F.mse_loss(self.vit.keys(reconstruction), target_keys),
        }
        (10 * losses["appearance"] + losses["structure"] + losses["identity"]).backward()
        self.optimizer.step()
        self.vit.model.zero_grad()
        return {name: loss.detach() for name, loss in losses.items()}
