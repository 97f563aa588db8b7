"""One site's part of a round: the private head update.

Opacus computes per-unit gradients; clipping, summing and noise are `veilgraft.privacy`'s. A unit
is a row of the feature tensor, whatever its number of instances, and is clipped once.

Guarantee: for features and heads of any values, `Trainer.update` of a private study is the
composition of `local_steps` Gaussian mechanisms of noise multiplier σ, over Poisson samples
(`dp-sgd`, Abadi et al. 2016, Algorithm 1) or over all units (`dp-gd`); adjacency is adding or
removing one unit. Nothing but its result depends on the units.

A unit's gradient, as computed, depends on that unit, the head and the dropout masks alone, to the
last bit. Every step to it is made so: the head's layers (`model.rowwise`), the losses (`_losses`)
and the sum over a unit's instances (`_unit_gradients`). Matrix products, which round a row by
where it stands among the others, would not do. With a head chosen for it, one unit could move
another's gradient: by its whole length through two hidden layers, and beyond the mechanism's
slack with none, which is why linear heads are computed like this too.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import GradSampleModule, register_grad_sampler
from opacus.optimizers import DPOptimizer
from torch import Tensor

from veilgraft.model import head as heads
from veilgraft.model.features import Features
from veilgraft.model.rowwise import RowLinear, unit_gradients
from veilgraft.model.tasks import TaskType, unit_losses
from veilgraft.privacy import mechanism
from veilgraft.privacy.noise import NoiseSource
from veilgraft.study import Study
from veilgraft_client.steps import Steps

PHYSICAL_INSTANCES = 4096
"""Instances that are in memory at once; speed, not privacy."""

PHYSICAL_NUMBERS = 2**20
"""Instances in memory at once times the head's parameters; speed, not privacy."""

PARTIAL_UNITS = 1024
"""Units in a partial sum before it is added to the total; privacy: see `PrivateOptimizer`."""


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimiser with our clipping, our noise and a public normaliser.

    However few units are in memory at once, the mechanism's bound for rounding holds. It is proved
    for 2,050 additions that a unit's gradient passes through on its way to the sum, at most. Here
    it passes through about 1,024 until its partial sum holds `PARTIAL_UNITS` units or more, and
    one for each such partial sum, of which `mechanism.MAX_UNITS` give at most 1,024.

    Args:
        sigma: noise multiplier.
        clip: L2 bound on one unit's gradient.
        normaliser: public constant by which a noised sum is divided.

    Attributes:
        drawn: noise for the next step, from the release's own source, used once.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        sigma: float,
        clip: float,
        normaliser: float,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=sigma,
            max_grad_norm=clip,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._normaliser = normaliser
        self.drawn: npt.NDArray[np.float64] | None = None
        self._parameters = self.params
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._forget()

    def _forget(self) -> None:
        self._total = self._partial = torch.zeros(sum(self._sizes), dtype=torch.float64)
        self._held = 0

    def clip_and_accumulate(self) -> None:
        """Clip each unit once over all parameters, add the sum, drop the units' gradients."""
        grads = [parameter.grad_sample for parameter in self._parameters]
        self._partial = self._partial + mechanism.clipped_sum(grads, self.max_grad_norm)
        self._held += len(grads[0])
        if self._held >= PARTIAL_UNITS:
            self._close_partial()
        for parameter in self._parameters:
            parameter.grad_sample = None

    def _close_partial(self) -> None:
        self._total = self._total + self._partial
        self._partial, self._held = torch.zeros_like(self._total), 0

    def add_noise(self) -> None:
        """Noise the sum on the grid, and divide it by the public normaliser, never by a count."""
        self._close_partial()
        assert self.drawn is not None
        sigma, clip = self.noise_multiplier, self.max_grad_norm
        noised = mechanism.add_noise(self._total.numpy(), clip, sigma, self.drawn)
        mean = torch.from_numpy(noised) / self._normaliser
        self.drawn = None
        parts = torch.split(mean, self._sizes)
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def pre_step(self, closure: None = None) -> bool:
        """Turn what was accumulated into the noised gradient of one step."""
        self.add_noise()
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the last step's sum and gradient."""
        self._forget()
        for parameter in self._parameters:
            parameter.grad = parameter.grad_sample = None


class PlainOptimizer:
    """The same steps without clipping and noise: not private."""

    drawn: npt.NDArray[np.float64] | None = None

    def __init__(self, optimizer: torch.optim.Optimizer, normaliser: float) -> None:
        self._optimizer = optimizer
        self._normaliser = normaliser

    def clip_and_accumulate(self) -> None:
        """Leave the sum where autograd keeps it."""

    def pre_step(self) -> bool:
        """Divide by the public normaliser."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad /= self._normaliser
        return True

    def step(self) -> None:
        """Take one step."""
        self.pre_step()
        self._optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the last step's gradient."""
        self._optimizer.zero_grad(set_to_none)


class Trainer(Steps):
    """Trains one site's head on its features with Opacus; keeps the wrapped head between rounds."""

    def __init__(self, study: Study, features: Features, *, sigma: float, units: float) -> None:
        super().__init__(study, features, sigma=sigma, units=units)
        self._source: NoiseSource | None = None
        labels = len(study.task.labels)
        head = heads.module(study.head, self.dim, labels, self._keep, rowwise=study.private)
        self.head = _per_unit(head) if study.private else head
        self._at_once = self._units_at_once(head)

    def update(
        self, start: heads.Arrays, rate: float, source: NoiseSource
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Return what the site releases for one round.

        With local steps: the change of the head after them, at the learning rate `rate`. Without:
        the gradient at `start`, summed and divided by the declared size.

        Args:
            source: fresh randomness, for this release alone.
        """
        heads.load(self.head, start)
        self.head.train()
        self._source = source
        optimizer = self._optimizer(rate)
        for count in self.blocks:
            taken = self.taken(source, count)
            noise = self.noise([source], count)
            for step in range(count):
                self._accumulate(optimizer, taken[step].nonzero().flatten())
                optimizer.drawn = None if noise is None else noise[0, step]
                if not self.study.training.sampled:
                    optimizer.pre_step()
                    found = {name: _array(p.grad) for name, p in self._parameters()}
                    break
                optimizer.step()
        if self.study.training.sampled:
            found = {name: _array(p) - start[name] for name, p in self._parameters()}
        optimizer.zero_grad(set_to_none=True)
        self._source = None
        return found

    def _keep(self, count: int, probability: float) -> Tensor:
        assert self._source is not None
        return self._source.bernoulli(count, probability)

    def _optimizer(self, rate: float) -> "PrivateOptimizer | PlainOptimizer":
        training = self.study.training
        momentum = training.momentum if training.sampled else 0.0
        sgd = torch.optim.SGD(self.head.parameters(), lr=rate, momentum=momentum)
        if not self.study.private:
            return PlainOptimizer(sgd, self.normaliser)
        clip = self.study.privacy.clip_norm
        return PrivateOptimizer(sgd, self.sigma, clip, self.normaliser)

    def _units_at_once(self, head: torch.nn.Module) -> int:
        parameters = sum(parameter.numel() for parameter in head.parameters())
        instances = min(PHYSICAL_INSTANCES, PHYSICAL_NUMBERS // parameters)
        return max(1, instances // self.features.mask.shape[1])

    def _accumulate(self, optimizer: PrivateOptimizer | PlainOptimizer, taken: Tensor) -> None:
        """Leave the sum of the taken units' (clipped) gradients with the optimiser."""
        optimizer.zero_grad(set_to_none=True)
        features = self.features
        for part in torch.split(taken, self._at_once):
            # Opacus' hooks warn unless the input asks for a gradient.
            values = features.values[part].to(torch.float64).requires_grad_(self.study.private)
            outputs = self.head(values)
            task, targets, mask = self.study.task.type, features.targets[part], features.mask[part]
            losses = _losses(task, outputs, targets, mask)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.clip_and_accumulate()

    def _parameters(self) -> list[tuple[str, Any]]:
        return [(n.removeprefix("_module."), p) for n, p in self.head.named_parameters()]


def _losses(task: TaskType, outputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Return each unit's loss, `(units,)`, whose gradient is the unit's own to the last bit.

    Torch's sigmoid has one formula for whole vectors of numbers and one for what is left of the
    batch. Its softmax has one for all, and a sigmoid is a softmax over zero and a number.
    """
    if task == "multilabel":
        outputs = torch.stack([torch.zeros_like(outputs), outputs], dim=-1).flatten(1, 2)
        mask = mask.repeat_interleave(targets.shape[2], dim=1)
        targets = targets.long().flatten(1)
    return unit_losses("classification", outputs, targets, mask)


@register_grad_sampler(RowLinear)  # type: ignore[untyped-decorator]
def _unit_gradients(
    layer: RowLinear, activations: list[Tensor], backprops: Tensor
) -> dict[Tensor, Tensor]:
    """Return each unit's gradient: the sum over its instances, in their order.

    Args:
        activations: the layer's inputs, one tensor `(units, instances, inputs)`.
        backprops: gradient by its outputs, `(units, instances, outputs)`.
    """
    weight, bias = unit_gradients(backprops, activations[0])
    return {layer.weight: weight, layer.bias: bias}


def _per_unit(head: torch.nn.Module) -> torch.nn.Module:
    module: torch.nn.Module = GradSampleModule(head, batch_first=True, loss_reduction="sum")
    return module


def _array(tensor: Tensor) -> npt.NDArray[np.float64]:
    return np.array(tensor.detach().cpu().numpy(), dtype=np.float64)
