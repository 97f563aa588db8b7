"""Noise is Gaussian far into its tails, never repeats and never leaves its process."""

import copy
import math
import multiprocessing
import os
import pickle
import random
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from veilgraft.privacy.noise import DITHER, KEYSTREAM_WORDS, NoiseSource, box_muller

SMALLEST, LARGEST = -(2**63), 2**63 - 1
DRAWS: list[Callable[[NoiseSource], object]] = [
    lambda source: source.normal(4),
    lambda source: source.normal(0),
    lambda source: source.bernoulli(4, 0.5),
    lambda source: source.generator(),
]


def pair(radius: int, angle: int, dither: int = 0) -> Tensor:
    return torch.from_numpy(box_muller(np.array([[radius], [angle], [dither]])))


def distinct(draws: Tensor) -> int:
    return len(set(draws.tolist()))


# The transform, by closed form.


def test_a_half_and_a_right_angle_give_the_pair_that_box_and_muller_say() -> None:
    half = 2**62 - 1  # (k + 1) / 2^63 = 1/2
    expected = math.sqrt(2.0 * math.log(2.0))
    assert pair(half, 0).tolist() == pytest.approx([expected, 0.0], abs=1e-15)
    assert pair(half, 2**62).tolist() == pytest.approx([0.0, expected], abs=1e-15)
    assert pair(half, SMALLEST).tolist() == pytest.approx([-expected, 0.0], abs=1e-15)


def test_the_smallest_uniform_reaches_beyond_nine_sigma() -> None:
    assert pair(0, 0)[0] == pytest.approx(math.sqrt(126.0 * math.log(2.0)))
    assert pair(0, 0)[0] > 9.3
    assert pair(0, 2**63 - 1)[0] < -9.3
    assert pair(0, -(2**62))[1] < -9.3


@pytest.mark.parametrize("radius", [SMALLEST, -1, 0, 1, LARGEST])
@pytest.mark.parametrize("angle", [SMALLEST, -1, 0, 1, LARGEST])
def test_no_keystream_word_makes_anything_but_finite_normals(radius: int, angle: int) -> None:
    assert pair(radius, angle, radius).isfinite().all()


@pytest.mark.parametrize("sigmas", [4.0, 6.0, 8.0, 8.7])
def test_the_dither_is_wider_than_the_holes_between_radii(sigmas: float) -> None:
    k = int(2**63 * math.exp(-(sigmas**2) / 2))
    outer, inner = pair(k, 0)[0], pair(k + 1, 0)[0]
    assert outer == pytest.approx(sigmas, abs=1e-3)
    assert 0.0 <= outer - inner < DITHER


def test_the_dither_is_a_thousandth_wide_and_differs_within_a_pair() -> None:
    lowest_and_highest = 2**31 | (2**31 - 1) << 32
    signed = (lowest_and_highest + 2**63) % 2**64 - 2**63
    low, high = pair(LARGEST, 0, signed).tolist()  # a radius of zero
    assert DITHER == 2.0**-10
    assert (low, high) == (-DITHER / 2, DITHER / 2 * (1 - 2.0**-31))


# The distribution.


def test_moments_are_those_of_a_standard_normal() -> None:
    draws = NoiseSource.seeded(1).normal(4_000_000)
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)]:
        standard_error = math.sqrt(variance / len(draws))
        assert draws.pow(power).mean().item() == pytest.approx(moment, abs=5 * standard_error)


@pytest.mark.parametrize("seed", range(5))
def test_draws_pass_kolmogorov_and_smirnov(seed: int) -> None:
    draws = NoiseSource.seeded(seed, "ks").normal(300_000)
    assert stats.kstest(draws.numpy(), stats.norm.cdf).pvalue > 1e-3


def test_tails_hold_as_many_draws_as_they_should() -> None:
    source = NoiseSource.seeded(2, "tails")
    blocks = 25
    beyond = torch.cat(
        [z[z > 4.0] for z in (source.normal(2_000_000).abs() for _ in range(blocks))]
    )
    for sigmas in (4.0, 4.5, 5.0, 5.5, 5.8):
        expected = blocks * 2_000_000 * 2.0 * stats.norm.sf(sigmas)
        low, high = stats.poisson.interval(0.9999, expected)
        assert low <= int((beyond > sigmas).sum()) <= high
    tail = stats.truncnorm(4.0, np.inf)
    assert stats.kstest(beyond.numpy(), tail.cdf).pvalue > 1e-3


def test_the_two_normals_of_a_pair_are_independent() -> None:
    cosines, sines = NoiseSource.seeded(3).normal(2**15).chunk(2)
    # Functions of radius and angle that any leftover of the transform would tie together.
    for f in (lambda z: z, torch.square, torch.abs, lambda z: (z.abs() > 2.0).double()):
        correlation = np.corrcoef(f(cosines).numpy(), f(sines).numpy())[0, 1]
        assert abs(correlation) < 5 / math.sqrt(2**14)
    radii = (cosines.square() + sines.square()).numpy()
    assert stats.kstest(radii, stats.chi2(2).cdf).pvalue > 1e-3


def test_neighbouring_blocks_of_one_call_share_nothing() -> None:
    draws = NoiseSource.seeded(4).normal(100_001)
    assert distinct(draws) == 100_001
    for lag in (1, 2**14, 2**15):
        assert abs(np.corrcoef(draws[lag:].numpy(), draws[:-lag].numpy())[0, 1]) < 0.025


@pytest.mark.parametrize("n", [0, 1, 2, 3, 650, 2**15 - 1, 2**15, 2**15 + 1])
def test_every_size_has_its_shape_and_type(n: int) -> None:
    source = NoiseSource.seeded(5)
    assert source.normal(n).shape == source.bernoulli(n, 0.5).shape == (n,)
    assert source.normal(n).dtype == torch.float64
    assert source.bernoulli(n, 0.5).dtype == torch.bool


# Coins.


def test_a_coin_is_exact_to_the_last_of_53_bits() -> None:
    first = int.from_bytes(bytes.fromhex("76b8e0ada0f13d90"), "little", signed=True)
    uniform = ((first >> 11) + 2**52) * 2.0**-53
    assert not NoiseSource(bytes(32)).bernoulli(1, uniform).item()
    assert NoiseSource(bytes(32)).bernoulli(1, uniform + 2.0**-53).item()


def test_certain_coins_are_certain() -> None:
    source = NoiseSource.seeded(6)
    assert source.bernoulli(100_000, 1.0).all()
    assert not source.bernoulli(100_000, 0.0).any()


@pytest.mark.parametrize("p", [1e-6, 1e-4, 0.02, 0.5, 0.98])
def test_coins_come_up_at_their_rate(p: float) -> None:
    n = 5_000_000
    low, high = stats.binom.interval(0.9999, n, p)
    assert low <= int(NoiseSource.seeded(7, "coins").bernoulli(n, p).sum()) <= high


@settings(deadline=None)
@given(p=st.floats(0.0, 1.0), q=st.floats(0.0, 1.0), seed=st.integers())
def test_a_likelier_coin_takes_every_unit_that_a_rarer_one_takes(
    p: float, q: float, seed: int
) -> None:
    rarer = NoiseSource.seeded(seed).bernoulli(50, min(p, q))
    likelier = NoiseSource.seeded(seed).bernoulli(50, max(p, q))
    assert not (rarer & ~likelier).any()


@pytest.mark.parametrize("p", [-0.1, 1.0000001, math.nan, math.inf])
def test_what_is_no_probability_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        NoiseSource.seeded(0).bernoulli(3, p)


def test_a_negative_count_is_refused() -> None:
    source = NoiseSource.seeded(0)
    with pytest.raises(ValueError, match="zero or more"):
        source.normal(-1)
    with pytest.raises(ValueError, match="zero or more"):
        source.bernoulli(-1, 0.5)


# Where the numbers come from.


def test_the_keystream_is_that_of_rfc_8439() -> None:
    # Appendix A.1, test vector 1: key, nonce and counter all zero.
    seed = NoiseSource(bytes(32)).generator().initial_seed()
    assert seed % 2**64 == int.from_bytes(bytes.fromhex("76b8e0ada0f13d90"), "little")


@settings(deadline=None)
@given(seed=st.integers(), context=st.lists(st.text() | st.integers()), n=st.integers(0, 99))
def test_the_same_seed_and_calls_give_the_same_bytes(
    seed: int, context: list[str | int], n: int
) -> None:
    one, two = NoiseSource.seeded(seed, *context), NoiseSource.seeded(seed, *context)
    assert torch.equal(one.normal(n), two.normal(n))
    assert torch.equal(one.bernoulli(n, 0.3), two.bernoulli(n, 0.3))
    assert one.generator().initial_seed() == two.generator().initial_seed()


def test_contexts_that_look_alike_give_unrelated_streams() -> None:
    contexts: list[tuple[str | int, ...]] = [
        (), ("",), ("", ""), ("ab", "c"), ("a", "bc"), ("abc",), ("a,b",), ("a", "b"), ('a","b',),
        (1,), ("1",), (1, 2), (12,), ("é",), ("e\u0301",), (-1,), ("null",),
    ]  # fmt: skip
    sources = [NoiseSource.seeded(0, *context) for context in contexts]
    sources += [NoiseSource.seeded(1), NoiseSource.seeded(-1), NoiseSource.seeded(2**64)]
    draws = torch.cat([source.normal(10) for source in sources])
    assert distinct(draws) == len(draws)


def test_each_call_takes_new_keystream() -> None:
    parts = NoiseSource.seeded(8)
    two, three, again = parts.normal(2), parts.normal(3), parts.normal(3)
    assert not torch.equal(torch.cat((two, three)), NoiseSource.seeded(8).normal(5))
    assert not torch.equal(three, again)


def test_no_two_fresh_sources_share_a_number() -> None:
    draws = torch.cat([NoiseSource.fresh().normal(64) for _ in range(2000)])
    assert distinct(draws) == len(draws)


def test_only_a_fresh_source_is_private() -> None:
    assert NoiseSource.fresh().private
    assert not NoiseSource.seeded(0).private
    assert not NoiseSource(bytes(32)).private


def test_generators_of_one_source_differ_and_are_explicit() -> None:
    source = NoiseSource.seeded(9)
    one, two = source.generator(), source.generator()
    assert not torch.equal(torch.rand(5, generator=one), torch.rand(5, generator=two))
    assert one is not torch.default_generator


def test_no_global_generator_is_touched() -> None:
    def states() -> tuple[bytes, bytes, object]:
        return (
            torch.get_rng_state().numpy().tobytes(),
            pickle.dumps(np.random.get_state()),
            random.getstate(),
        )

    before = states()
    with NoiseSource.fresh() as source:
        torch.rand(3, generator=source.generator())
        source.normal(1000)
        source.bernoulli(1000, 0.1)
    NoiseSource.seeded(1, "x").normal(10)
    assert states() == before


# How long it lives, and where.


@pytest.mark.parametrize("draw", DRAWS)
def test_a_closed_source_gives_nothing(draw: Callable[[NoiseSource], object]) -> None:
    with NoiseSource.fresh() as source:
        draw(source)
    source.close()
    with pytest.raises(RuntimeError, match="closed"):
        draw(source)


def test_a_closed_source_holds_no_cipher() -> None:
    source = NoiseSource.seeded(10)
    source.close()
    kept = [getattr(source, name) for name in NoiseSource.__slots__]
    assert all(value is None or isinstance(value, int) for value in kept)


def test_a_source_closes_when_its_release_fails() -> None:
    with pytest.raises(ZeroDivisionError), NoiseSource.fresh() as source:
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="closed"):
        source.normal(1)


@pytest.mark.parametrize(
    "leave",
    [copy.copy, copy.deepcopy, pickle.dumps, lambda source: copy.deepcopy({"noise": [source]})],
)
def test_a_source_cannot_be_pickled_or_copied(leave: Callable[[NoiseSource], object]) -> None:
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        leave(NoiseSource.fresh())


def test_repr_tells_the_kind_and_not_the_key() -> None:
    key = bytes(range(65, 97))
    with NoiseSource(key) as source:
        assert repr(source) == "<NoiseSource: seeded, not private, open>"
    assert repr(source) == "<NoiseSource: seeded, not private, closed>"
    assert repr(NoiseSource.fresh()) == "<NoiseSource: private, open>"
    assert not hasattr(source, "__dict__")


def test_a_request_beyond_the_keystream_takes_no_memory_and_no_keystream() -> None:
    source, untouched = NoiseSource.seeded(11), NoiseSource.seeded(11)
    with pytest.raises(RuntimeError, match="spent"):
        source.normal(KEYSTREAM_WORDS)
    with pytest.raises(RuntimeError, match="spent"):
        source.bernoulli(KEYSTREAM_WORDS + 1, 0.5)
    assert 8 * KEYSTREAM_WORDS < 64 * 2**32
    assert torch.equal(source.normal(3), untouched.normal(3))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("draw", DRAWS)
def test_a_forked_process_cannot_use_its_parents_source(
    draw: Callable[[NoiseSource], object],
) -> None:
    source = NoiseSource.fresh()
    verdict, own = in_a_fork(source, draw)
    assert verdict == "NoiseSource: used in another process than the one that made it"
    assert source.normal(8).tolist() != own


def test_sources_made_on_either_side_of_a_fork_differ() -> None:
    source = NoiseSource.fresh()
    children = [in_a_fork(source, DRAWS[0])[1] for _ in range(3)]
    draws = [*children, source.normal(8).tolist(), NoiseSource.fresh().normal(8).tolist()]
    assert len({z for eight in draws for z in eight}) == 8 * len(draws)


def in_a_fork(
    source: NoiseSource, draw: Callable[[NoiseSource], object]
) -> tuple[str, list[float]]:
    """What a forked child hears from its parent's source, and eight draws of a source its own."""

    def child(pipe: Connection) -> None:
        try:
            draw(source)
            heard = "nothing"
        except RuntimeError as error:
            heard = str(error)
        pipe.send((heard, NoiseSource.fresh().normal(8).tolist()))

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    with warnings.catch_warnings():
        # Python 3.12 and later warn of a fork beside torch's threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()
    said: tuple[str, list[float]] = ours.recv()
    process.join()
    ours.close()
    return said
