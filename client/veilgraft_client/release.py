"""From requests that may be answered to releases: reserve, compute, commit, for one vault or many.

Vaults that share a ledger, as those of a simulation do, write to it together, once before and once
after each group that is computed together.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from veilgraft import messages
from veilgraft.messages import Envelope, Request
from veilgraft.model.features import Cohort
from veilgraft.model.head import Arrays
from veilgraft.privacy.noise import NoiseSource
from veilgraft.study import Study
from veilgraft_client import evaluation
from veilgraft_client.fused import Fused, Work, together
from veilgraft_client.ledger import Key, Ledger

if TYPE_CHECKING:
    from veilgraft_client.training import Trainer
    from veilgraft_client.vault import Vault


@dataclass(frozen=True)
class Wanted:
    """A release that may be given, once it is paid for."""

    vault: "Vault"
    study: Study
    request: Request
    envelope: Envelope
    head: Arrays
    cohort: Cohort
    trainer: "Fused | Trainer"

    @property
    def key(self) -> Key:
        """What names it in the ledger."""
        asked, site = self.request, self.vault.site.site
        return Key(site, self.study.digest, asked.round, asked.head, asked.kind)

    @property
    def fused(self) -> Fused | None:
        """The engine with which it can be computed together with others."""
        trainer = self.trainer
        return trainer if self.request.kind == "update" and isinstance(trainer, Fused) else None

    def alone(self, source: NoiseSource) -> Mapping[str, np.ndarray]:
        """Compute it, whatever its kind."""
        match self.request.kind:
            case "update":
                return self.trainer.update(self.head, self.request.rate, source)
            case "evaluation":
                return evaluation.evaluate(self.study, self.head, self.cohort.held_out, source)
            case "label-counts":
                return evaluation.count_labels(self.study, self.cohort.whole, source)

    def failed(self, error: Exception) -> Envelope:
        """Return the refusal."""
        self.vault.begin_anew(self.study)
        return self.vault.refused(self.envelope, error)


def answers(asked: Sequence[tuple["Vault", Envelope]]) -> list[Envelope]:
    """Answer one request to each of some vaults; never raises, and says no more than `Vault`."""
    found: dict[int, Envelope] = {}
    wanted: dict[int, Wanted] = {}
    with ExitStack() as locked:
        for vault in {id(vault): vault for vault, _ in asked}.values():
            locked.enter_context(vault.lock)
        for place, (vault, envelope) in enumerate(asked):
            try:
                checked = vault.checked(envelope)
            except Exception as error:  # noqa: BLE001 - it stays here
                checked = vault.refused(envelope, error)
            if isinstance(checked, Envelope):
                found[place] = checked
            else:
                wanted[place] = checked
        for places in _by(wanted, lambda each: id(each.vault.ledger)):
            found |= _given({place: wanted[place] for place in places})
    return [found[place] for place in range(len(asked))]


def _given(wanted: Mapping[int, Wanted]) -> dict[int, Envelope]:
    """Pay, compute and store what is one ledger's."""
    ledger = next(iter(wanted.values())).vault.ledger
    try:
        paid = ledger.reserve_all([each.key for each in wanted.values()])
    except Exception as error:  # noqa: BLE001 - it stays here
        return {place: each.failed(error) for place, each in wanted.items()}
    found: dict[int, Envelope] = {}
    reserved: dict[int, int] = {}
    for (place, each), outcome in zip(wanted.items(), paid, strict=True):
        match outcome:
            case int():
                reserved[place] = outcome
            case bytes():
                found[place] = each.vault.release(each.envelope, outcome)
            case _:
                found[place] = each.vault.refused(each.envelope, outcome)
    groups = list(_groups({place: wanted[place] for place in reserved}))
    computed = _each([[wanted[place] for place in places] for places in groups])
    for places, payloads in zip(groups, computed, strict=True):
        outcomes = _stored(ledger, [reserved[place] for place in places], payloads)
        for place, stored in zip(places, outcomes, strict=True):
            each = wanted[place]
            if isinstance(stored, bytes):
                found[place] = each.vault.release(each.envelope, stored)
            else:
                found[place] = each.failed(stored)
    return found


def _each(groups: list[list[Wanted]]) -> "Iterator[list[bytes | Exception]]":
    """Yield what each group releases; of the fused engine, one is computed on each core."""
    if len(groups) <= 1 or any(group[0].fused is None for group in groups):
        yield from map(_payloads, groups)
        return
    cores = len(os.sched_getaffinity(0))
    # Products this small are no work for torch's own threads.
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(_payloads, groups)


def _stored(
    ledger: Ledger, reservations: Sequence[int], payloads: "list[bytes | Exception]"
) -> "list[bytes | Exception]":
    """Commit what was computed; return what may be sent."""
    good = {place: payload for place, payload in enumerate(payloads) if isinstance(payload, bytes)}
    found = list(payloads)
    try:
        sent = ledger.commit_all(
            [(reservations[place], payload) for place, payload in good.items()]
        )
    except Exception as error:  # noqa: BLE001 - it stays here
        return [error] * len(payloads)
    for place, payload in zip(good, sent, strict=True):
        found[place] = payload
    return found


def _payloads(group: Sequence[Wanted]) -> "list[bytes | Exception]":
    try:
        with ExitStack() as opened:
            sources = [
                opened.enter_context(each.vault.noise(each.study, each.request)) for each in group
            ]
            released = _computed(group, sources)
    except Exception as error:  # noqa: BLE001 - it stays here
        return [error] * len(group)
    return [
        messages.pack(arrays)
        if all(np.isfinite(array).all() for array in arrays.values())
        else ValueError("a release must be finite")
        for arrays in released
    ]


def _computed(
    group: Sequence[Wanted], sources: Sequence[NoiseSource]
) -> Sequence[Mapping[str, np.ndarray]]:
    if len(group) == 1:
        return [group[0].alone(sources[0])]
    works = [
        Work(each.fused, each.head, each.request.rate, source)
        for each, source in zip(group, sources, strict=True)
        if each.fused is not None
    ]
    return together(works)


def _groups(wanted: Mapping[int, Wanted]) -> Iterator[list[int]]:
    """Yield the places of what is computed together."""
    for places in _by(wanted, lambda each: each.fused and each.fused.form):
        fused = wanted[places[0]].fused
        size = fused.sites_at_once if fused else 1
        yield from (places[at : at + size] for at in range(0, len(places), size))


def _by(wanted: Mapping[int, Wanted], key: Callable[[Wanted], object]) -> Iterable[list[int]]:
    alike: dict[object, list[int]] = defaultdict(list)
    for place, each in wanted.items():
        alike[key(each)].append(place)
    return alike.values()
