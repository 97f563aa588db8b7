"""The fused engine: one site's steps, or many sites', as a few large products.

It computes what `training.Trainer` does with Opacus, without per-unit gradients. Of a unit with
one instance the gradient of a layer is an outer product δxᵀ, whose norm is ‖δ‖·‖x‖; of several,
its square is the sum of the products of two small Gram matrices, of the δ and of the x (Goodfellow
2015, Efficient per-example gradient computations; Li, Tramèr, Liang & Hashimoto 2022, Large
language models can be strong differentially private learners, §4). So the clip factors are known
before any gradient is formed, and the clipped sum is one matrix product.

Guarantee: that of `training`. What has to be a unit's own to the last bit is δ, and with it the
layers' outputs: they are `exact.product`s, of activations that are cut to 24 bits, and functions
that torch computes alike for every row. So are the Gram matrices. All else is within the
mechanism's slack:

- A norm is off by a few roundings, relatively; of several instances, of the *sum* of their norms,
  which where they cancel is far more than the unit's. So a unit whose instances' norms add up to
  more than `CANCELLED` times its own is clipped the plain way, from its gradient itself. That
  takes longer, which shows to the grain of a site's `reply_seconds`.
- Summing n units adds at most n C `CANCELLED` of length, each part in at most 2,050 additions, for
  which the mechanism's proof has room while n `CANCELLED` is at most `MAX_UNITS`; `fits` says so.

No number here overflows: activations and gradients beyond `BOUND`, or that are no numbers, make
their own unit count for nothing, as in the mechanism's table, and weights can't grow so far. A sum
that turned into NaN over one unit would be refused, and a refusal tells.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from veilgraft.model import exact
from veilgraft.model import head as heads
from veilgraft.model.features import Features
from veilgraft.model.rowwise import unit_gradients
from veilgraft.privacy import mechanism
from veilgraft.privacy.noise import NoiseSource
from veilgraft.study import Study
from veilgraft_client.steps import Steps

CANCELLED = 16
"""By how much a unit's instances may cancel before its gradient is formed."""

ROWS = 1024
"""Instances in one product, for which the mechanism's bound on additions is proved."""

NUMBERS = 2**21
"""Numbers in memory at once, about, over all sites trained together; speed, not privacy."""

GATHERED = 2**17
"""Numbers of features gathered at a time, about; what is larger is not in the cache any more."""

BOUND = 1e60
"""Of activations and of gradients by them. Products of two, squared, are still floats; what is lost
where their squares underflow is nothing beside any clip norm."""

_ROUNDING = 2.0**-30
"""Above the relative error of a Gram norm's square: a rounding of 2^-53 for each of 2^20 terms."""


class Fused(Steps):
    """Trains one site's head on its features; see `training.Trainer`, whose interface it has.

    Args:
        device: that steps are computed on.
    """

    def __init__(
        self,
        study: Study,
        features: Features,
        *,
        sigma: float,
        units: float,
        device: str = "cpu",
    ) -> None:
        super().__init__(study, features, sigma=sigma, units=units)
        if study.private and not fits(features):
            raise ValueError("expected fewer units, or instances of each, for the fused engine")
        self.device = device
        growth = self.largest_step * study.training.local_steps
        if study.private and not growth <= BOUND:
            raise ValueError("expected a learning rate with which a head stays below 1e60")
        # What is not computed with may hold anything, and 0 × NaN would be NaN.
        there = features.mask & self.used.unsqueeze(1)
        values = features.values
        if not bool(there.all()):
            values = torch.where(there.unsqueeze(2), values, 0.0)
        self.values = _cut(values).to(device)
        self.squares = _squares(self.values, features.mask).to(device)
        self.mask = features.mask.to(device)
        self.targets = features.targets.to(device)

    @property
    def largest_step(self) -> float:
        """Return a bound on how far one step moves a weight, after any number of them."""
        training, privacy = self.study.training, self.study.privacy
        longest = (mechanism.MAX_UNITS + 10 * self.sigma) * privacy.clip_norm / self.normaliser
        return training.learning_rate * longest / (1 - training.momentum)

    @property
    def form(self) -> tuple[object, ...]:
        """What must be alike for sites to be trained together."""
        shape, blocks = self.values.shape[1:], tuple(self.blocks)
        return (self.study.digest, shape, self.sigma, self.device, blocks)

    @property
    def sites_at_once(self) -> int:
        """How many sites of this form are trained together at most, for their memory's sake."""
        units, instances, dim = self.values.shape
        taken = units * (self.study.training.sample_rate or 1.0)
        numbers = self.values.numel() + self.blocks[0] * (self.dimension + taken * instances * dim)
        return max(1, int(NUMBERS / max(1.0, numbers)))

    def update(
        self, start: heads.Arrays, rate: float, source: NoiseSource
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Return what the site releases for one round; see `training.Trainer.update`."""
        (released,) = together([Work(self, start, rate, source)])
        return released


@dataclass(frozen=True)
class Work:
    """One site's round: the head it starts from, the learning rate, its own randomness."""

    trainer: Fused
    start: heads.Arrays
    rate: float
    source: NoiseSource


def fits(features: Features) -> bool:
    """Return whether the mechanism's proof covers sums of so many units and instances."""
    units, instances = features.mask.shape
    if instances == 1:
        return units <= mechanism.MAX_UNITS
    return units * max(instances, CANCELLED) <= mechanism.MAX_UNITS and instances <= ROWS


def together(works: Sequence[Work]) -> list[dict[str, npt.NDArray[np.float64]]]:
    """Return the releases of sites whose work is of one form, each from its own randomness.

    What a site releases does not depend on the others, but for the last bits of a sum, which the
    mechanism's grid takes away nearly always.
    """
    return _Sites(works).update()


class _Sites:
    """Some sites' round; tensors have the sites as their first dimension."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.works = works
        first = works[0].trainer
        self.study, self.sigma, self.device = first.study, first.sigma, first.device
        self.shapes, self.dimension = first.shapes, first.dimension
        held = [work.trainer for work in works]
        self.values = _joined([each.values for each in held])
        self.squares = _joined([each.squares for each in held])
        self.mask = _joined([each.mask for each in held])
        self.targets = _joined([each.targets for each in held])
        sizes = [len(each.values) for each in held]
        self.offsets = torch.tensor([0, *sizes]).cumsum(0)[:-1]
        start = np.stack([_flat(work.start) for work in works])
        self.start = torch.from_numpy(start).to(self.device)
        normalisers = [[each.normaliser] for each in held]
        self.normaliser = torch.tensor(normalisers, dtype=torch.float64, device=self.device)
        rates = [[work.rate] for work in works]
        self.rate = torch.tensor(rates, dtype=torch.float64, device=self.device)
        self.instances = self.values.shape[1]
        widest = max(max(shape) for shape in self.shapes.values())
        self.numbers = len(works) * self.instances * widest
        self.at_once = max(1, min(ROWS // self.instances, NUMBERS // self.numbers))

    def update(self) -> list[dict[str, npt.NDArray[np.float64]]]:
        training = self.study.training
        head, velocity = self.start.clone(), torch.zeros_like(self.start)
        for count in self.works[0].trainer.blocks:
            taken = [work.trainer.taken(work.source, count) for work in self.works]
            noise = self.works[0].trainer.noise([work.source for work in self.works], count)
            if noise is not None:
                noise = noise.to(self.device)
            picked = _picked(taken, self.offsets, self.device)
            for step, parts in enumerate(self._batches(picked)):
                total = self._total(self._layers(head), parts)
                if noise is not None:
                    clip = self.study.privacy.clip_norm
                    total = mechanism.add_noise(total, clip, self.sigma, noise[:, step])
                mean = total / self.normaliser
                if not training.sampled:
                    return self._released(mean)
                velocity = mean if not training.momentum else velocity * training.momentum + mean
                head = head - self.rate * velocity
        return self._released(head - self.start)

    def _total(self, layers: list[tuple[Tensor, Tensor]], parts: "Iterable[_Batch]") -> Tensor:
        """Return each site's sum of (clipped) gradients over all parts.

        Small parts are added up before they are added to the total, so that a gradient passes
        through no more additions than the mechanism's proof allows.
        """
        total = partial = torch.zeros_like(self.start)
        held = 0
        for part in parts:
            partial, held = partial + self._sum(layers, part), held + part.valid.shape[1]
            if held * self.instances >= ROWS:
                total, partial, held = total + partial, torch.zeros_like(partial), 0
        return total + partial

    def _released(self, found: Tensor) -> list[dict[str, npt.NDArray[np.float64]]]:
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        rows = found.cpu().numpy()
        ends = np.cumsum(sizes)[:-1]
        return [
            {
                name: part.reshape(shape)
                for (name, shape), part in zip(
                    self.shapes.items(), np.split(row, ends), strict=True
                )
            }
            for row in rows
        ]

    def _layers(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts = torch.split(flat, [math.prod(shape) for shape in self.shapes.values()], 1)
        tensors = [p.view(-1, *s) for p, s in zip(parts, self.shapes.values(), strict=True)]
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def _batches(self, picked: "_Picked") -> "Iterator[Iterable[_Batch]]":
        """Yield, step by step, the units that were taken, in parts that fit into memory."""
        steps, _, widest = picked.places.shape
        if widest > self.at_once:
            for step in range(steps):
                yield map(self._gathered, picked.cut(step, self.at_once))
            return
        size = max(1, GATHERED // (self.numbers * max(1, widest)))
        for first in range(0, steps, size):
            gathered = self._gathered(picked.steps(first, size))
            for step in range(len(gathered.valid)):
                yield (gathered.at(step, picked.widths[first + step]),)

    def _gathered(self, picked: "_Picked") -> "_Batch":
        places = picked.places.flatten()
        shape = (*picked.places.shape, self.instances)
        x = self.values.index_select(0, places).double()
        counts = picked.valid.unsqueeze(-1) & self.mask.index_select(0, places).view(shape)
        targets = self.targets.index_select(0, places)
        return _Batch(
            x.view(*shape, x.shape[2]),
            self.squares.index_select(0, places).view(shape),
            counts,
            targets.view(*shape, *targets.shape[2:]),
            picked.valid,
        )

    def _sum(self, layers: list[tuple[Tensor, Tensor]], batch: "_Batch") -> Tensor:
        """Return each site's sum of (clipped) gradients over some units."""
        instances = self.instances
        # Instances are rows from here on: those of a unit follow one another.
        inputs, slopes, fine = self._forward(layers, batch)
        residual = _residual(inputs.pop(), batch.targets.flatten(1, 2))
        there, deltas = batch.counts, [residual]
        # Features and weights are bounded: without a hidden layer nothing can overflow.
        if slopes:
            deltas, fine = _backward(layers, residual, slopes, fine)
            # One spoilt instance spoils its unit; one that is not there, nothing.
            there = there & (fine.view_as(there) | ~there).all(2, keepdim=True)
        deltas = [torch.where(there.flatten(1).unsqueeze(2), delta, 0.0) for delta in deltas]
        if not self.study.private:
            return _gradient(deltas, inputs)
        clip = self.study.privacy.clip_norm
        if instances == 1:
            norms = _norms(deltas, inputs, batch.squares.flatten(1))
            return _gradient(_scaled(deltas, mechanism.clip_factors(norms, clip)), inputs)
        # Cut like activations, so that products of two are a unit's own.
        deltas = [exact.rounded(delta) for delta in deltas]
        norms, plain = _norms_of_several(deltas, inputs, instances)
        factors = torch.where(plain, mechanism.clip_factors(norms, clip), 0.0)
        scaled = _scaled(deltas, factors.repeat_interleave(instances, dim=1))
        return _gradient(scaled, inputs) + _cancelling(deltas, inputs, ~plain, instances, clip)

    def _forward(
        self, layers: list[tuple[Tensor, Tensor]], batch: "_Batch"
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return each layer's inputs and, last, the outputs; slopes; and which rows are fine."""
        spec, slopes = self.study.head, list[Tensor]()
        inputs = [batch.values.flatten(1, 2)]
        fine = torch.ones(inputs[0].shape[:2], dtype=torch.bool, device=self.device)
        for index, (weight, bias) in enumerate(layers):
            outputs = exact.product(inputs[-1], weight) + bias.unsqueeze(1)
            if index == len(layers) - 1:
                inputs.append(outputs)
                break
            values, slope = _ACTIVATIONS[spec.activation](outputs)
            if spec.dropout:
                kept = self._kept(values, batch.valid, 1 - spec.dropout)
                values, slope = values * kept, slope * kept
            values, whole = _bounded(exact.rounded(values))
            fine = fine & whole
            slopes.append(slope)
            inputs.append(values)
        return inputs, slopes, fine

    def _kept(self, values: Tensor, valid: Tensor, probability: float) -> Tensor:
        """Draw dropout for the units that were taken, from each site's own source."""
        kept = torch.zeros(values.shape, dtype=torch.float64)
        width, instances = values.shape[2], self.instances
        for site, (work, units) in enumerate(zip(self.works, valid.sum(1).tolist(), strict=True)):
            drawn = work.source.bernoulli(units * instances * width, probability)
            kept[site, : units * instances] = drawn.view(-1, width) / probability
        return kept.to(self.device)


@dataclass(frozen=True)
class _Picked:
    """The units of some steps, site by site, filled up to one length.

    Attributes:
        places: row of each in all sites' features, int64 `(steps, sites, units)`.
        valid: bool, of the same shape; those of a site come first.
        widths: of each step, how many units the site with most has.
    """

    places: Tensor
    valid: Tensor
    widths: list[int]

    def steps(self, first: int, count: int) -> "_Picked":
        """Return some steps."""
        part = slice(first, first + count)
        return _Picked(self.places[part], self.valid[part], self.widths[part])

    def cut(self, step: int, size: int) -> "Iterator[_Picked]":
        """Yield so many units of one step at a time; what then holds them has no steps."""
        for first in range(0, self.widths[step], size):
            part = slice(first, min(first + size, self.widths[step]))
            yield _Picked(self.places[step, :, part], self.valid[step, :, part], [])


@dataclass(frozen=True)
class _Batch:
    """Units with all that is computed with; `(sites, units, …)`, or before that the steps.

    Attributes:
        values: `(…, instances, dim)`, float64, zero where there is no instance.
        squares: of the norms of values and a one, `(…, instances)`.
        counts: which instances there are, bool; it may be one for all of a unit's.
        targets: `(…, instances)` or `(…, instances, labels)`.
        valid: which units there are, bool.
    """

    values: Tensor
    squares: Tensor
    counts: Tensor
    targets: Tensor
    valid: Tensor

    def at(self, step: int, width: int) -> "_Batch":
        """Return one step's, without what only fills up."""
        fields = (self.values, self.squares, self.counts, self.targets, self.valid)
        return _Batch(*(each[step, :, :width] for each in fields))


def _picked(taken: list[Tensor], offsets: Tensor, device: str) -> _Picked:
    """Return the units of all sites and steps; `taken` is `(steps, units)` for each site."""
    counts = torch.stack([each.sum(1) for each in taken], 1)
    places = torch.zeros(*counts.shape, int(counts.max()), dtype=torch.int64)
    for site, each in enumerate(taken):
        step, unit = each.nonzero(as_tuple=True)
        first = counts[:, site].cumsum(0) - counts[:, site]
        places[step, site, torch.arange(len(step)) - first[step]] = unit + offsets[site]
    valid = torch.arange(places.shape[2]) < counts.unsqueeze(2)
    return _Picked(places.to(device), valid.to(device), counts.amax(1).tolist())


def _residual(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of each instance's loss by its outputs, `(sites, rows, labels)`.

    By softmax alone, also for several labels: see `training._losses`.
    """
    if targets.ndim == 3:
        pairs = torch.stack([torch.zeros_like(outputs), outputs], dim=-1)
        return pairs.softmax(-1)[..., 1] - targets
    return outputs.softmax(-1).scatter_add(
        2, targets.unsqueeze(2), torch.full_like(outputs[..., :1], -1.0)
    )


def _relu(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.relu(), (values > 0).double()


def _tanh(values: Tensor) -> tuple[Tensor, Tensor]:
    found = values.tanh()
    return found, 1 - found * found


def _gelu(values: Tensor) -> tuple[Tensor, Tensor]:
    share = 0.5 + 0.5 * torch.erf(values * math.sqrt(0.5))
    density = (values * values * -0.5).exp() * math.sqrt(0.5 / math.pi)
    return values * share, share + values * density


_ACTIVATIONS = {"relu": _relu, "tanh": _tanh, "gelu": _gelu}


def _bounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows, zero where one holds what is not a number below `BOUND`, and which do not."""
    # Written so that NaN fails.
    fine = rows.abs().amax(-1) <= BOUND
    return torch.where(fine.unsqueeze(-1), rows, 0.0), fine


def _backward(
    layers: list[tuple[Tensor, Tensor]], residual: Tensor, slopes: list[Tensor], fine: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Return the gradient of each instance's loss by each layer's outputs; which rows are fine."""
    delta, whole = _bounded(residual)
    deltas, fine = [delta], fine & whole
    for (weight, _), slope in zip(layers[:0:-1], reversed(slopes), strict=True):
        found = exact.product(exact.rounded(deltas[0]), weight.mT) * slope
        delta, whole = _bounded(found)
        deltas.insert(0, delta)
        fine = fine & whole
    return deltas, fine


def _gradient(deltas: list[Tensor], inputs: list[Tensor]) -> Tensor:
    """Return the sum of the instances' gradients over all parameters, `(sites, dimension)`."""
    found = []
    for delta, values in zip(deltas, inputs, strict=True):
        found += [(delta.mT @ values).flatten(1), delta.sum(1)]
    return torch.cat(found, 1)


def _scaled(deltas: list[Tensor], factors: Tensor) -> list[Tensor]:
    weights = factors.unsqueeze(2)
    return [delta * weights for delta in deltas]


def _norms(deltas: list[Tensor], inputs: list[Tensor], squares: Tensor) -> Tensor:
    """Return the norms of the gradients of units with one instance, `(sites, units)`.

    Args:
        squares: of the first layer's inputs.
    """
    total = squares * deltas[0].square().sum(2)
    for delta, values in zip(deltas[1:], inputs[1:], strict=True):
        total = total + (values.square().sum(2) + 1) * delta.square().sum(2)
    return total.sqrt_()


def _norms_of_several(
    deltas: list[Tensor], inputs: list[Tensor], instances: int
) -> tuple[Tensor, Tensor]:
    """Return the norms of units' gradients, `(sites, units)`, and which of them may be used."""
    total: Tensor | float = 0.0
    for delta, values in zip(deltas, inputs, strict=True):
        d, x = (each.view(len(each), -1, instances, each.shape[2]) for each in (delta, values))
        # The bias sees a one beside the inputs.
        total = total + (exact.product(x, x) + 1) * exact.product(d, d)
    gram = torch.as_tensor(total)
    apart = gram.diagonal(dim1=2, dim2=3).sqrt().sum(2).square()
    squares = gram.sum((2, 3))
    norms = (squares.clamp(min=0) + _ROUNDING * apart).sqrt()
    return norms, squares * CANCELLED**2 >= apart


def _cancelling(
    deltas: list[Tensor], inputs: list[Tensor], chosen: Tensor, instances: int, clip: float
) -> Tensor:
    """Return the clipped sums over these units, `(sites, dimension)`, from their gradients."""
    dimension = sum(d.shape[2] * (x.shape[2] + 1) for d, x in zip(deltas, inputs, strict=True))
    sums = torch.zeros(len(chosen), dimension, dtype=torch.float64, device=chosen.device)
    for site, units in enumerate(chosen):
        places = units.nonzero().flatten()
        for part in torch.split(places, max(1, NUMBERS // dimension)):
            grads: list[Tensor] = []
            for delta, values in zip(deltas, inputs, strict=True):
                pair = (delta[site], values[site])
                d, x = (each.view(-1, instances, each.shape[1])[part] for each in pair)
                grads += unit_gradients(d, x)
            sums[site] += mechanism.clipped_sum(grads, clip)
    return sums


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _flat(arrays: heads.Arrays) -> npt.NDArray[np.float64]:
    return np.concatenate([array.ravel() for array in arrays.values()])


def _squares(values: Tensor, mask: Tensor) -> Tensor:
    """Return the squares of the norms of values and a one, float64 `(units, instances)`."""
    parts = [torch.linalg.vector_norm(part.double(), dim=2) for part in torch.split(values, 2**14)]
    return torch.where(mask, torch.cat(parts).square_() + 1, 0.0)


def _cut(values: Tensor) -> Tensor:
    """Return features that products are exact for; the same where they are so already."""
    split = torch.split(values, 2**14)
    parts = [exact.rounded(part) for part in split]
    if all(torch.equal(one, other) for one, other in zip(parts, split, strict=True)):
        return values
    return torch.cat(parts)
