"""What a site's own file lets a study ask for."""

from typing import Any

import pytest
from tests.client.gated import study

from veilgraft.errors import InputError, RefusedError
from veilgraft.plan import plan
from veilgraft.study import Study
from veilgraft_client import policy
from veilgraft_client.policy import Site


def site(*, limits: dict[str, Any] | None = None, **changes: Any) -> Site:
    values: dict[str, Any] = {
        "site": "a",
        "data": {"path": "/records.csv"},
        "units": 20,
        "limits": {"max_epsilon": 50.0, **(limits or {})},
        "state": "/state",
    }
    return Site.parse({**values, **changes}, name="site.yaml")


def check(own: Site, contract: Study, *, seeded: bool = False) -> None:
    policy.check_study(own, contract, plan(contract), seeded=seeded)


def test_the_least_noise_of_any_release_has_to_reach_the_floor() -> None:
    check(site(limits={"min_noise_multiplier": 5.0}), study())
    with pytest.raises(RefusedError, match=r"least noise multiplier is 5; .* is 5.1"):
        check(site(limits={"min_noise_multiplier": 5.1}), study())
    counted = study(evaluation={"label_counts": {"noise_multiplier": 2.0}})
    with pytest.raises(RefusedError, match=r"least noise multiplier is 2; .* is 5"):
        check(site(limits={"min_noise_multiplier": 5.0}), counted)


def test_the_floor_is_no_floor_for_public_data_without_noise() -> None:
    plain = study(privacy={}, training={"algorithm": "none", "rounds": 1, "learning_rate": 1.0})
    limits = {"min_noise_multiplier": 5.0}
    check(site(limits=limits, data_is_public=True), plain)
    with pytest.raises(RefusedError, match=r"training.algorithm none gives no privacy"):
        check(site(limits=limits), plain)


def test_the_clip_norm_has_to_stay_below_the_site_s() -> None:
    tall = study(privacy={"noise_multiplier": 5.0, "clip_norm": 3.0})
    check(site(limits={"max_clip_norm": 3.0}), tall)
    with pytest.raises(RefusedError, match=r"clip_norm is 3; limits.max_clip_norm is 2.9"):
        check(site(limits={"max_clip_norm": 2.9}), tall)


def test_a_seed_needs_public_data() -> None:
    with pytest.raises(InputError, match="seed: expected none where data_is_public is not true"):
        site(seed=1)
    assert site(seed=1, data_is_public=True).seed == 1
    check(site(data_is_public=True), study(), seeded=True)
    with pytest.raises(RefusedError, match="a seed gives no privacy"):
        check(site(), study(), seeded=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"courier_user": 0},
        {"isolation": "none"},
        {"reply_seconds": 0},
        {"reply_seconds": 601},
        {"units": 0},
        {"held_out": 1},
        {"limits": {"requests_per_minute": 0}},
        {"limits": {"max_backbone_bytes": 0}},
        {"limits": {"min_noise_multiplier": -1}},
        {"data_is_public": "yes"},
        {"device": "tpu"},
    ],
)
def test_what_makes_no_sense_is_said_at_once(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        site(**changes)
