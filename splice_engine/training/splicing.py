"""The training proper: samples of the pair, painted by the generator and compared by the terms of the objective."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..settings import Settings
from .crops import CropSampler
from .generator import Generator
from .objective import Objective, Pictures, Targets
from .pair import Pair, Sample
from .run import backward


class Splicing:
    """The training proper (paper, section 3): samples of the pair, painted, compared by the objective's terms.

    Args:
        generator: Whose weights are trained.
        forward: Applies it.
        objective: The terms.
        pair: The pictures at training size.
        sampler: Draws samples of them.
        settings: The recipe.
        residual: `[1, 3, H, W]`, added to the output for the structure picture, or None.
        appearance_first: The first step has the appearance term alone, as the paper begins.
    """

    def __init__(
        self,
        generator: Generator,
        forward: Callable[[Tensor], Tensor],
        objective: Objective,
        pair: Pair,
        sampler: CropSampler,
        settings: Settings,
        residual: Tensor | None,
        appearance_first: bool,
    ) -> None:
        self.forward, self.objective, self.pair, self.sampler = forward, objective, pair, sampler
        self.settings, self.residual, self.index = settings, residual, 0
        self.appearance_first = appearance_first and "appearance" in objective.terms
        terms = objective.terms.values()
        self.identity_only = all(term.output == "reconstruction" for term in terms)
        self.compares_whole = any(term.output == "output" and term.target != "matched" for term in terms)
        self.optimizer = torch.optim.Adam(
            generator.parameters(), settings.learning_rate, betas=(settings.beta1, settings.beta2)
        )
        self.decay = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, 1.0, settings.learning_rate_end, total_iters=settings.steps - 1
        )

    def take_step(self) -> tuple[Tensor, dict[str, Tensor]]:
        """One step: its total, and the unweighted losses by name."""
        settings, index = self.settings, self.index
        first = index == 0 and self.appearance_first
        names = ["appearance"] if first else None
        a, b = self.sampler.structure(self.pair, self.residual), self.sampler.appearance(self.pair)
        output = self.paint(a)
        with_identity = not first and (self.identity_only or index % settings.identity_every == 0)
        reconstruction = self.forward(b.picture) if with_identity else None
        targets = self.extract_targets(a, b, names)
        pictures = Pictures(output, a.picture, a.target, b.picture, reconstruction, a.mask, b.mask)
        self.optimizer.zero_grad(set_to_none=True)
        colour = 1 + (settings.colour_end - 1) * min(1.0, index / max(1, settings.steps - 1))
        total, losses = backward(self.objective, pictures, names, targets, {"colour": colour})
        if self.compares_whole and settings.whole_every and index % settings.whole_every == 0:
            # A backward pass of its own: the same sum of gradients, without both graphs in memory at once.
            whole = Sample(self.pair.structure, residual=self.residual, mask=self.pair.structure_mask)
            pictures = Pictures(
                self.paint(whole),
                whole.picture,
                appearance=b.picture,
                structure_mask=whole.mask,
                appearance_mask=b.mask,
            )
            whole_total, whole_losses = backward(self.objective, pictures, names)
            total = total + whole_total
            losses.update({f"whole_{name}": loss for name, loss in whole_losses.items()})
        self.optimizer.step()
        self.decay.step()
        self.index += 1
        return total, losses

    def paint(self, sample: Sample) -> Tensor:
        """The generator's output for a sample of the structure picture, with the residual added."""
        output = self.forward(sample.picture)
        return output if sample.residual is None else (output + sample.residual).clamp(0, 1)

    def extract_targets(self, a: Sample, b: Sample, names: Sequence[str] | None) -> Targets:
        """Features that the outputs are compared with; a cached crop keeps its own, and both share one pass."""
        new_a, new_b = (None if sample.features else sample for sample in (a, b))
        pictures = Pictures(
            structure=new_a.picture if new_a else None,
            appearance=new_b.picture if new_b else None,
            structure_mask=a.mask,
            appearance_mask=b.mask,
        )
        features = self.objective.targets(pictures, None if self.settings.cached_crops else names)
        for sample, name in ((new_a, "structure"), (new_b, "appearance")):
            if sample is not None:
                sample.features = {key: value for key, value in features.items() if key[0] == name}
        return {**a.features, **b.features}
