"""One site's part of a round: the private head update.

Opacus computes per-unit gradients; clipping, summing and noise are `veilgraft.privacy`'s. A unit
is a row of the feature tensor, whatever its number of instances, and is clipped once.

Guarantee: for features of any values, `Trainer.update` of a private study is the composition of
`local_steps` Gaussian mechanisms of noise multiplier σ, over Poisson samples (`dp-sgd`, Abadi et
al. 2016, Algorithm 1) or over all units (`dp-gd`); adjacency is adding or removing one unit.
Nothing but its result depends on the units.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor

from veilgraft.model import head as heads
from veilgraft.model.features import Features
from veilgraft.model.tasks import unit_losses
from veilgraft.privacy import mechanism
from veilgraft.privacy.noise import NoiseSource
from veilgraft.study import Study

PHYSICAL_UNITS = 4096
"""Units whose gradients are in memory at once; speed, not privacy."""


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimiser with our clipping, our noise and a public normaliser.

    Args:
        sigma: noise multiplier.
        clip: L2 bound on one unit's gradient.
        normaliser: public constant by which a noised sum is divided.
        source: noise of this release alone.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        sigma: float,
        clip: float,
        normaliser: float,
        source: NoiseSource,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=sigma,
            max_grad_norm=clip,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._normaliser = normaliser
        self._source = source
        self._parameters = self.params
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._total: Tensor | None = None

    def clip_and_accumulate(self) -> None:
        """Clip each unit once over all parameters, add the sum, drop the units' gradients."""
        grads = [parameter.grad_sample for parameter in self._parameters]
        total = mechanism.clipped_sum(grads, self.max_grad_norm)
        self._total = total if self._total is None else self._total + total
        for parameter in self._parameters:
            parameter.grad_sample = None

    def add_noise(self) -> None:
        """Noise the sum on the grid, and divide it by the public normaliser, never by a count."""
        assert self._total is not None
        noise, clip = self.noise_multiplier, self.max_grad_norm
        mean = mechanism.noised(self._total, clip, noise, self._source) / self._normaliser
        parts = torch.split(mean, self._sizes)
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def pre_step(self, closure: None = None) -> bool:
        """Turn what was accumulated into the noised gradient of one step."""
        self.add_noise()
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the last step's sum and gradient."""
        self._total = None
        for parameter in self._parameters:
            parameter.grad = parameter.grad_sample = None


class PlainOptimizer:
    """The same steps without clipping and noise: not private."""

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


class Trainer:
    """Trains one site's head on its features; keeps the wrapped head between rounds.

    Args:
        sigma: noise multiplier of every step; zero where the study is not private.
        units: the size that the site declared; never a measured one.
    """

    def __init__(self, study: Study, features: Features, *, sigma: float, units: int) -> None:
        self.study = study
        self.features = features
        self.sigma = sigma
        self.normaliser = units * (study.training.sample_rate or 1.0)
        if study.private:
            # Settings that the mechanism can't keep its promise for stop here, before a round is
            # paid.
            shapes = heads.shapes(study.head, self.dim, len(study.task.labels))
            dimension = sum(math.prod(shape) for shape in shapes.values())
            mechanism.grid(study.privacy.clip_norm, sigma, dimension)
            if len(features) > mechanism.MAX_UNITS:
                raise ValueError(f"expected at most {mechanism.MAX_UNITS} units")
        self._source: NoiseSource | None = None
        head = heads.module(study.head, self.dim, len(study.task.labels), self._keep)
        self.head = _per_unit(head) if study.private else head

    @property
    def dim(self) -> int:
        """Features per instance."""
        return self.features.values.shape[-1]

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
        optimizer = self._optimizer(rate, source)
        training = self.study.training
        if training.sample_rate is None:
            self._accumulate(optimizer, torch.arange(len(self.features)))
            optimizer.pre_step()
            result = {name: _array(p.grad) for name, p in self._parameters()}
        else:
            for _ in range(training.local_steps):
                taken = source.bernoulli(len(self.features), training.sample_rate)
                self._accumulate(optimizer, taken.nonzero().flatten())
                optimizer.step()
            result = {name: _array(p) - start[name] for name, p in self._parameters()}
        optimizer.zero_grad(set_to_none=True)
        self._source = None
        return result

    def _keep(self, count: int, probability: float) -> Tensor:
        assert self._source is not None
        return self._source.bernoulli(count, probability)

    def _optimizer(self, rate: float, source: NoiseSource) -> "PrivateOptimizer | PlainOptimizer":
        training = self.study.training
        momentum = training.momentum if training.sampled else 0.0
        sgd = torch.optim.SGD(self.head.parameters(), lr=rate, momentum=momentum)
        if not self.study.private:
            return PlainOptimizer(sgd, self.normaliser)
        clip = self.study.privacy.clip_norm
        return PrivateOptimizer(sgd, self.sigma, clip, self.normaliser, source)

    def _accumulate(self, optimizer: PrivateOptimizer | PlainOptimizer, taken: Tensor) -> None:
        """Leave the sum of the taken units' (clipped) gradients with the optimiser."""
        optimizer.zero_grad(set_to_none=True)
        features = self.features
        for part in torch.split(taken, PHYSICAL_UNITS):
            # Opacus' hooks warn unless the input asks for a gradient.
            values = features.values[part].to(torch.float64).requires_grad_(self.study.private)
            losses = unit_losses(
                self.study.task.type,
                self.head(values),
                features.targets[part],
                features.mask[part],
            )
            losses.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.clip_and_accumulate()

    def _parameters(self) -> list[tuple[str, Any]]:
        return [(n.removeprefix("_module."), p) for n, p in self.head.named_parameters()]


def _per_unit(head: torch.nn.Module) -> torch.nn.Module:
    module: torch.nn.Module = GradSampleModule(head, batch_first=True, loss_reduction="sum")
    return module


def _array(tensor: Tensor) -> npt.NDArray[np.float64]:
    return np.array(tensor.detach().cpu().numpy(), dtype=np.float64)
