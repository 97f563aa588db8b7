"""The fused engine: one site's steps, or many sites', as a few large products.

It computes what `training.Trainer` does with Opacus, without per-unit gradients. Of a unit with
one instance the gradient of a layer is an outer product δxᵀ, whose norm is ‖δ‖·‖x‖; of several,
its square is the sum of the products of two small Gram matrices, of the δ and of the x (Goodfellow
2015, Efficient per-example gradient computations; Li, Tramèr, Liang & Hashimoto 2022, Large
language models can be strong differentially private learners, §4). So the clip factors are known
before any gradient is formed, and the clipped sum is one matrix product.

Guarantee: that of `training`. What has to be a unit's own to the last bit is δ, and with it the
layers' outputs, and the norm, with the choice of how it is found. They are `exact` products, of
activations that are cut to 24 bits, and functions and sums over a row that NumPy and torch compute
alike for every row of an array whose rows lie in memory one after the other. All else is within
the mechanism's slack:

- A norm is off by a few roundings, relatively; of several instances, of the *sum* of their norms,
  which where they cancel is far more than the unit's. So a unit whose instances' norms add up to
  more than `CANCELLED` times its own is clipped the plain way, from its gradient itself. That
  takes longer, which shows to the grain of a site's `reply_seconds`.
- Summing n units adds at most n C `CANCELLED` of length, each part in at most 2,050 additions, for
  which the mechanism's proof has room while n `CANCELLED` is at most `MAX_UNITS`; `fits` says so.

No number here overflows: activations and gradients beyond `BOUND`, or that are no numbers, make
their own unit count for nothing, as in the mechanism's table, and weights can't grow so far. A sum
that turned into NaN over one unit would be refused, and a refusal tells.

In NumPy, on the CPU: a call takes a third of the time of one of torch's, and a step is sixty.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from veilgraft.model import exact
from veilgraft.model import head as heads
from veilgraft.model.exact import Array
from veilgraft.model.features import Features
from veilgraft.model.rowwise import unit_gradients
from veilgraft.privacy import mechanism
from veilgraft.privacy.noise import NoiseSource
from veilgraft.study import Study
from veilgraft_client.steps import Steps

Mask = npt.NDArray[np.bool_]
Layers = list[tuple[Array, Array]]

CANCELLED = 16
"""By how much a unit's instances may cancel before its gradient is formed."""

ROWS = 1024
"""Instances in one product, for which the mechanism's bound on additions is proved."""

NUMBERS = 2**21
"""Numbers in memory at once, about, over all sites trained together; speed, not privacy."""

GATHERED = 2**19
"""Numbers of features gathered at a time, about; what is larger is not in the cache any more."""

BOUND = 1e60
"""Of activations and of gradients by them. Products of two, squared, are still floats; what is lost
where their squares underflow is nothing beside any clip norm."""

_ROUNDING = 2.0**-30
"""Above the relative error of a Gram norm's square: a rounding of 2^-53 for each of 2^20 terms."""


class Fused(Steps):
    """Trains one site's head on its features; see `training.Trainer`, whose interface it has."""

    def __init__(self, study: Study, features: Features, *, sigma: float, units: float) -> None:
        super().__init__(study, features, sigma=sigma, units=units)
        if study.private and not fits(features):
            raise ValueError("expected fewer units, or instances of each, for the fused engine")
        growth = self.largest_step * study.training.local_steps
        if study.private and not growth <= BOUND:
            raise ValueError("expected a learning rate with which a head stays below 1e60")
        self.mask: Mask = features.mask.numpy()
        # What is not computed with may hold anything, and 0 × NaN would be NaN.
        there = self.there.numpy()
        # In one order of memory, which the order of NumPy's sums follows.
        values = np.ascontiguousarray(features.values.numpy())
        if not there.all():
            values = np.where(there[:, :, None], values, 0.0)
        self.values = _cut(values)
        self.squares = _squares(self.values, self.mask)
        self.targets: npt.NDArray[Any] = self.features.targets.numpy()

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
        return (self.study.digest, shape, self.sigma, blocks)

    @property
    def sites_at_once(self) -> int:
        """How many sites of this form are trained together at most, for their memory's sake."""
        units, instances, dim = self.values.shape
        taken = units * (self.study.training.sample_rate or 1.0)
        numbers = self.values.size + self.blocks[0] * (self.dimension + taken * instances * dim)
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
    """Some sites' round; arrays have the sites as their first dimension."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.works = works
        first = works[0].trainer
        self.study, self.sigma = first.study, first.sigma
        self.shapes, self.dimension = first.shapes, first.dimension
        held = [work.trainer for work in works]
        self.values = _joined([each.values for each in held])
        self.squares = _joined([each.squares for each in held])
        self.mask = _joined([each.mask for each in held])
        self.targets = _joined([each.targets for each in held])
        self.sizes = [len(each.values) for each in held]
        self.start = np.stack([_flat(work.start) for work in works])
        self.normaliser = np.array([[each.normaliser] for each in held])
        self.rate = np.array([[work.rate] for work in works])
        self.instances = self.values.shape[1]
        widest = max(max(shape) for shape in self.shapes.values())
        self.numbers = len(works) * self.instances * widest
        self.at_once = max(1, min(ROWS // self.instances, NUMBERS // self.numbers))

    # What overflows makes its own unit count for nothing.
    @np.errstate(all="ignore")
    @torch.inference_mode()
    def update(self) -> list[dict[str, Array]]:
        training, clip = self.study.training, self.study.privacy.clip_norm
        head, velocity = self.start.copy(), np.zeros(())
        layers = self._layers(head)
        for count in self.works[0].trainer.blocks:
            taken = [work.trainer.taken(work.source, count).numpy() for work in self.works]
            noise = self.works[0].trainer.noise([work.source for work in self.works], count)
            for step, parts in enumerate(self._batches(_picked(taken, self.sizes))):
                total = self._total(layers, parts)
                if noise is not None:
                    total = mechanism.add_noise(total, clip, self.sigma, noise[:, step])
                if not training.sampled:
                    return self._released(total / self.normaliser)
                total *= self.rate / self.normaliser
                velocity = total + velocity * training.momentum if training.momentum else total
                head -= velocity
        return self._released(head - self.start)

    def _total(self, layers: Layers, parts: "Iterable[_Batch]") -> Array:
        """Return each site's sum of (clipped) gradients over all parts.

        Small parts are added up before they are added to the total, so that a gradient passes
        through no more additions than the mechanism's proof allows.
        """
        sums: list[Array] = []
        held = ROWS
        for part in parts:
            found = self._sum(layers, part)
            if held >= ROWS:
                sums.append(found)
                held = 0
            else:
                sums[-1] += found
            held += part.valid.shape[1] * self.instances
        return sum(sums[1:], start=sums[0]) if sums else np.zeros_like(self.start)

    def _released(self, found: Array) -> list[dict[str, Array]]:
        sites = zip(*self._views(found), strict=True)
        return [dict(zip(self.shapes, arrays, strict=True)) for arrays in sites]

    def _layers(self, flat: Array) -> Layers:
        """Return views of `(sites, dimension)`: each layer's weight and bias."""
        views = self._views(flat)
        return list(zip(views[::2], views[1::2], strict=True))

    def _views(self, flat: Array) -> list[Array]:
        """Return views of `(sites, dimension)`, one for each array of the head."""
        views, start = [], 0
        for shape in self.shapes.values():
            end = start + math.prod(shape)
            views.append(flat[:, start:end].reshape(-1, *shape, copy=False))
            start = end
        return views

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
        places = picked.places
        return _Batch(
            self.values.take(places, 0).astype(np.float64, copy=False),
            self.squares.take(places, 0),
            picked.valid[..., None] & self.mask.take(places, 0),
            self.targets.take(places, 0),
            picked.valid,
        )

    def _sum(self, layers: Layers, batch: "_Batch") -> Array:
        """Return each site's sum of (clipped) gradients over some units."""
        instances = self.instances
        # Instances are rows from here on: those of a unit follow one another.
        inputs, slopes, fine = self._forward(layers, batch)
        residual = _residual(inputs.pop(), _rows(batch.targets))
        there, deltas = batch.counts, [residual]
        # Features, targets and weights are bounded: without a hidden layer nothing can overflow.
        if slopes:
            deltas, fine = _backward(layers, residual, slopes, fine)
            # One spoilt instance spoils its unit; one that is not there, nothing.
            there = there & (fine.reshape(there.shape) | ~there).all(2, keepdims=True)
        rows = _rows(there)
        if not self.study.private:
            return self._gradient(_scaled(deltas, rows), inputs)
        clip = self.study.privacy.clip_norm
        if instances == 1:
            norms = _norms(deltas, inputs, _rows(batch.squares))
            factors = mechanism.clip_factors(norms, clip) * rows
            return self._gradient(_scaled(deltas, factors), inputs)
        # Cut like activations, so that products of two are a unit's own.
        deltas = [exact.rounded(delta) for delta in _scaled(deltas, rows)]
        norms, plain = _norms_of_several(deltas, inputs, instances)
        factors = np.where(plain, mechanism.clip_factors(norms, clip), 0.0)
        found = self._gradient(_scaled(deltas, factors.repeat(instances, axis=1)), inputs)
        return found + _cancelling(deltas, inputs, ~plain, instances, clip)

    def _gradient(self, deltas: list[Array], inputs: list[Array]) -> Array:
        """Return the sum of the instances' gradients over all parameters, `(sites, dimension)`."""
        found = np.empty_like(self.start)
        for (weight, bias), delta, values in zip(self._layers(found), deltas, inputs, strict=True):
            np.matmul(delta.swapaxes(1, 2), values, out=weight)
            np.sum(delta, 1, out=bias)
        return found

    def _forward(self, layers: Layers, batch: "_Batch") -> tuple[list[Array], list[Array], Mask]:
        """Return each layer's inputs and, last, the outputs; slopes; and which rows are fine."""
        spec, slopes = self.study.head, list[Array]()
        inputs = [_rows(batch.values)]
        fine = np.ones(inputs[0].shape[:2], dtype=np.bool_)
        for index, (weight, bias) in enumerate(layers):
            outputs = exact.product(inputs[-1], weight)
            outputs += bias[:, None]
            if index == len(layers) - 1:
                inputs.append(outputs)
                break
            values, slope = _activated(spec.activation, outputs)
            if spec.dropout:
                kept = self._kept(values.shape, batch.valid, 1 - spec.dropout)
                values, slope = values * kept, slope * kept
            values, whole = _bounded(exact.rounded(values))
            fine = fine & whole
            slopes.append(slope)
            inputs.append(values)
        return inputs, slopes, fine

    def _kept(self, shape: tuple[int, ...], valid: Mask, probability: float) -> Array:
        """Draw dropout for the units that were taken, from each site's own source."""
        kept = np.zeros(shape)
        width, instances = shape[2], self.instances
        for site, (work, units) in enumerate(zip(self.works, valid.sum(1).tolist(), strict=True)):
            drawn = work.source.bernoulli(units * instances * width, probability).numpy()
            kept[site, : units * instances] = drawn.reshape(-1, width) / probability
        return kept


@dataclass(frozen=True)
class _Picked:
    """The units of some steps, site by site, filled up to one length.

    Attributes:
        places: row of each in all sites' features, int64 `(steps, sites, units)`.
        valid: bool, of the same shape; those of a site come first.
        widths: of each step, how many units the site with most has.
    """

    places: npt.NDArray[np.int64]
    valid: Mask
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
        counts: which instances there are, bool.
        targets: `(…, instances)` or `(…, instances, labels)`.
        valid: which units there are, bool.
    """

    values: Array
    squares: Array
    counts: Mask
    targets: npt.NDArray[Any]
    valid: Mask

    def at(self, step: int, width: int) -> "_Batch":
        """Return one step's, without what only fills up."""
        part = (step, slice(None), slice(width))
        return _Batch(
            self.values[part],
            self.squares[part],
            self.counts[part],
            self.targets[part],
            self.valid[part],
        )


def _picked(taken: list[Mask], sizes: list[int]) -> _Picked:
    """Return the units of all sites and steps; `taken` is `(steps, units)` for each site."""
    steps, sites = len(taken[0]), len(taken)
    step, place = np.concatenate(taken, axis=1).nonzero()
    # In the order of steps, within them of sites: what has one step and site follows one another.
    part = step * sites + np.repeat(np.arange(sites), sizes)[place]
    counts = np.bincount(part, minlength=steps * sites)
    rank = np.arange(len(part)) - (counts.cumsum() - counts)[part]
    places = np.zeros((steps * sites, counts.max()), dtype=np.int64)
    places[part, rank] = place
    counts = counts.reshape(steps, sites)
    valid = np.arange(places.shape[1]) < counts[..., None]
    return _Picked(places.reshape(valid.shape), valid, counts.max(1).tolist())


def _residual(outputs: Array, targets: npt.NDArray[Any]) -> Array:
    """Return the gradient of each instance's loss by its outputs, `(sites, rows, labels)`."""
    if targets.ndim == 3:
        # A sigmoid, as the softmax over zero and a number; neither exponential overflows.
        largest = np.maximum(outputs, 0.0)
        positive = np.exp(outputs - largest)
        found: Array = positive / (np.exp(-largest) + positive) - targets
        return found
    powers: Array = np.exp(outputs - outputs.max(-1, keepdims=True))
    powers /= powers.sum(-1, keepdims=True)
    powers.reshape(-1)[np.arange(targets.size) * powers.shape[2] + targets.reshape(-1)] -= 1.0
    return powers


def _activated(activation: str, outputs: Array) -> tuple[Array, Array]:
    """Return a hidden layer's activations and their derivative by its outputs."""
    values, slope = _ACTIVATIONS[activation](torch.from_numpy(outputs))
    return values.numpy(), slope.numpy()


def _relu(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return values.relu(), (values > 0).double()


def _tanh(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = values.tanh()
    return found, 1 - found * found


def _gelu(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    share = 0.5 + 0.5 * torch.erf(values * math.sqrt(0.5))
    density = (values * values * -0.5).exp() * math.sqrt(0.5 / math.pi)
    return values * share, share + values * density


_ACTIVATIONS = {"relu": _relu, "tanh": _tanh, "gelu": _gelu}


def _bounded(rows: Array) -> tuple[Array, Mask]:
    """Return rows, zero where one holds what is not a number below `BOUND`, and which do not."""
    # Written so that NaN fails.
    fine = np.abs(rows).max(-1) <= BOUND
    return np.where(fine[..., None], rows, 0.0), fine


def _backward(
    layers: Layers, residual: Array, slopes: list[Array], fine: Mask
) -> tuple[list[Array], Mask]:
    """Return the gradient of each instance's loss by each layer's outputs; which rows are fine."""
    delta, whole = _bounded(residual)
    deltas, fine = [delta], fine & whole
    for (weight, _), slope in zip(layers[:0:-1], reversed(slopes), strict=True):
        found = exact.product(exact.rounded(deltas[0]), weight.swapaxes(1, 2)) * slope
        delta, whole = _bounded(found)
        deltas.insert(0, delta)
        fine = fine & whole
    return deltas, fine


def _scaled(deltas: list[Array], factors: npt.NDArray[Any]) -> list[Array]:
    weights = factors[..., None]
    return [delta * weights for delta in deltas]


def _norms(deltas: list[Array], inputs: list[Array], squares: Array) -> Array:
    """Return the norms of the gradients of units with one instance, `(sites, units)`.

    Args:
        squares: of the first layer's inputs.
    """
    total = squares * np.square(deltas[0]).sum(2)
    for delta, values in zip(deltas[1:], inputs[1:], strict=True):
        total += (np.square(values).sum(2) + 1) * np.square(delta).sum(2)
    norms: Array = np.sqrt(total, out=total)
    return norms


def _norms_of_several(
    deltas: list[Array], inputs: list[Array], instances: int
) -> tuple[Array, Mask]:
    """Return the norms of units' gradients, `(sites, units)`, and which of them may be used."""
    total = np.zeros(())
    for delta, values in zip(deltas, inputs, strict=True):
        d, x = (each.reshape(len(each), -1, instances, each.shape[2]) for each in (delta, values))
        # The bias sees a one beside the inputs.
        total = total + (exact.gram(x) + 1) * exact.gram(d)
    apart = np.square(np.sqrt(np.diagonal(total, axis1=2, axis2=3)).sum(2))
    squares = total.sum((2, 3))
    norms = np.sqrt(np.maximum(squares, 0) + _ROUNDING * apart)
    return norms, squares * CANCELLED**2 >= apart


def _cancelling(
    deltas: list[Array], inputs: list[Array], chosen: Mask, instances: int, clip: float
) -> Array:
    """Return the clipped sums over these units, `(sites, dimension)`, from their gradients."""
    dimension = sum(d.shape[2] * (x.shape[2] + 1) for d, x in zip(deltas, inputs, strict=True))
    sums = np.zeros((len(chosen), dimension))
    for site, units in enumerate(chosen):
        places, size = units.nonzero()[0], max(1, NUMBERS // dimension)
        for first in range(0, len(places), size):
            part = places[first : first + size]
            grads: list[torch.Tensor] = []
            for pair in zip(deltas, inputs, strict=True):
                d, x = (
                    torch.from_numpy(each[site].reshape(-1, instances, each.shape[2])[part])
                    for each in pair
                )
                grads += unit_gradients(d, x)
            sums[site] += mechanism.clipped_sum(grads, clip).numpy()
    return sums


def _rows(units: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return what is held of each unit's instances, `(sites, units, instances, …)`, row by row."""
    sites, count, instances, *rest = units.shape
    return units.reshape(sites, count * instances, *rest)


def _joined(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _flat(arrays: heads.Arrays) -> Array:
    return np.concatenate([array.ravel() for array in arrays.values()])


def _parts(values: npt.NDArray[Any]) -> Iterator[slice]:
    """Cut units into parts of so many numbers, about, that copies of them are small."""
    size = max(1, NUMBERS // max(1, math.prod(values.shape[1:])))
    return (slice(start, start + size) for start in range(0, max(1, len(values)), size))


def _squares(values: npt.NDArray[Any], mask: Mask) -> Array:
    """Return the squares of the norms of values and a one, `(units, instances)`."""
    parts = [np.square(values[part], dtype=np.float64).sum(2) for part in _parts(values)]
    return np.where(mask, np.concatenate(parts) + 1, 0.0)


def _cut(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return features that products are exact for; the same where they are so already."""
    if all(np.array_equal(values[part], exact.rounded(values[part])) for part in _parts(values)):
        return values
    return np.concatenate([exact.rounded(values[part]) for part in _parts(values)])
