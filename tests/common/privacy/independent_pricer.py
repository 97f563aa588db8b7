"""The ε of noised steps by a second road: NumPy and SciPy alone, no accounting library.

    python independent_pricer.py DELTA < steps.txt

Each line holds `noise_multiplier sample_rate steps`; prints the ε of all of them together, for
add-or-remove-one neighbours. An estimate good to about 0.1%, not a bound.

The privacy loss of each step is put on a grid with its mean kept, the grids are convolved by
Fourier transform (Koskela, Jälkö & Honkela 2020; Gopi, Lee & Wutschitz 2021), and δ(ε) is summed
over the losses above ε; once with the unit removed and once with it added.
"""

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr
from scipy.stats import norm

Array = npt.NDArray[np.float64]
Steps = tuple[float, float, int]
"""Noise multiplier, sample rate, number of steps."""


def epsilon(plan: Sequence[Steps], delta: float) -> float:
    """Return the ε of all steps of `plan` at `delta`."""
    return max(_epsilon(plan, delta, removed) for removed in (True, False))


def _epsilon(plan: Sequence[Steps], delta: float, removed: bool) -> float:
    moments = [_moments(sigma, rate, removed) for sigma, rate, _ in plan]
    counts = np.array([steps for _, _, steps in plan])
    means, variances = np.array(moments).T
    spread = np.sqrt(counts @ variances)
    cell = min(2e-3, spread / np.sqrt(counts.sum()) / 20)
    reach = abs(counts @ means) + 12 * spread + 1
    while True:
        losses, masses = _convolved(plan, means, cell, reach, removed)
        edge = np.abs(losses) > 0.75 * reach
        if abs(masses[edge].sum()) + abs(1 - masses.sum()) < 1e-3 * delta:
            return _root(losses, masses, delta)
        reach *= 2


def _loss(x: Array, sigma: float, rate: float) -> Array:
    """Return log of the mixture's density over N(0, σ²)'s, at `x`."""
    with np.errstate(divide="ignore"):
        both = np.logaddexp(np.log1p(-rate), np.log(rate) + (2 * x - 1) / (2 * sigma**2))
    return np.asarray(both, dtype=np.float64)


def _moments(sigma: float, rate: float, removed: bool) -> tuple[float, float]:
    """Return mean and variance of one step's privacy loss, by the trapezoidal rule."""
    x = np.linspace(-14 * sigma, 14 * sigma + 1, 40_001)
    density = norm.pdf(x, 0, sigma)
    if removed:
        density = (1 - rate) * density + rate * norm.pdf(x, 1, sigma)
    loss = _loss(x, sigma, rate) * (1 if removed else -1)
    mean = float(np.trapezoid(density * loss, x))
    return mean, float(np.trapezoid(density * (loss - mean) ** 2, x))


def _cumulative(loss: Array, sigma: float, rate: float, removed: bool) -> Array:
    """Return the probability that one step's privacy loss is at most `loss`."""
    ratio = loss if removed else -loss
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # The point x at which the densities' log ratio is this; none below log(1 - rate).
        scaled = ratio + np.log1p(-(1 - rate) * np.exp(-ratio)) - np.log(rate)
    x = np.nan_to_num(sigma**2 * scaled + 0.5, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    if removed:
        return np.asarray((1 - rate) * ndtr(x / sigma) + rate * ndtr((x - 1) / sigma))
    return np.asarray(ndtr(-x / sigma))


def _convolved(
    plan: Sequence[Steps], means: Array, cell: float, reach: float, removed: bool
) -> tuple[Array, Array]:
    """Return the losses of the whole plan and their masses, on a circle of width 2 × `reach`."""
    half = 1 << int(np.ceil(np.log2(reach / cell)))
    borders = (np.arange(-half, half + 1, dtype=np.float64) - 0.5) * cell
    grid = borders[:-1] + cell / 2
    transform, shift = np.ones(half + 1, dtype=np.complex128), 0.0
    for (sigma, rate, steps), mean in zip(plan, means, strict=True):
        masses = np.diff(_cumulative(borders, sigma, rate, removed))
        shift += steps * (mean - float(masses @ grid))
        transform *= np.fft.rfft(np.fft.ifftshift(masses)) ** steps
    return grid + shift, np.fft.fftshift(np.fft.irfft(transform))


def _root(losses: Array, masses: Array, delta: float) -> float:
    low, high = 0.0, float(losses[-1])
    for _ in range(60):
        middle = (low + high) / 2
        above = losses > middle
        excess = -np.expm1(middle - losses[above]) @ masses[above]
        low, high = (middle, high) if excess > delta else (low, middle)
    return high if low else 0.0


def main() -> None:
    """Read steps from standard input and print their ε at the δ of the first argument."""
    lines = [line.split() for line in sys.stdin if line.strip()]
    plan = [(float(sigma), float(rate), int(steps)) for sigma, rate, steps in lines]
    print(epsilon(plan, float(sys.argv[1])) if plan else 0.0)


if __name__ == "__main__":
    main()
