"""The coordinator's figures."""

import asyncio
import urllib.error
import urllib.request
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from veilgraft.errors import InputError
from veilgraft_server.checkpoint import Drop, Round
from veilgraft_server.metrics import STATUSES, Metrics, Reason, Status, reason


def round_(number: int, *drops: str) -> Round:
    return Round(
        round=number,
        accuracy=0.875,
        loss=0.4375,
        epsilon=1.5,
        sites=3 - len(drops),
        dropped=len(drops),
        seconds=2.5,
        drops=tuple(Drop(f"clinic-{i}", text) for i, text in enumerate(drops)),
    )


HISTORY = [round_(1), round_(2, "no answer"), round_(3, "refused: unavailable", "Flower error 1")]


def status(**changes: object) -> Status:
    made = Status.of(HISTORY, state="running", rounds=10, quorum=2, online=3)
    return made.model_copy(update=changes)


def figures(text: bytes) -> dict[str, float]:
    """Return samples as `name` or `name:label` without the prefix."""
    return {
        ":".join([sample.name.removeprefix("veilgraft_"), *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Give a body back, or the status that the path names."""
    request = Request(scope, receive)
    code = request.url.path.strip("/")
    body = await request.body()
    response = Response(b"no", int(code)) if code else Response(body)
    await response(scope, receive, send)


async def call(edge: ASGIApp) -> None:
    transport = httpx.ASGITransport(edge)
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
        assert (await client.post("/", content=b"x" * 100)).content == b"x" * 100
        for code in (403, 403, 413, 500):
            assert (await client.get(f"/{code}")).status_code == code


def test_the_status_sums_up_a_runs_rounds_and_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    assert Status.load(path) is None
    made = status()
    made.save(path)
    assert Status.load(path) == made
    assert (made.round, made.valid, made.seconds) == (3, 6, 2.5)
    assert made.dropped == {"no-answer": 1, "refused": 1, "transport": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no answer", "no-answer"),
        ("refused: unavailable", "refused"),
        ("Flower error 2", "transport"),
        ("payload: expected finite numbers", "invalid"),
        ("answers another request", "invalid"),
        ("", "invalid"),
        (": no answer", "invalid"),
    ],
)
def test_every_reason_of_a_drop_has_one_of_four_classes(text: str, expected: Reason) -> None:
    assert reason(text) == expected


def test_the_figures_are_the_status_files_and_the_edges_own(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    metrics = Metrics(path, lambda: 4)
    asyncio.run(call(metrics.watch(echo)))
    before = figures(metrics.render())
    assert before["sites_enrolled"] == 4
    assert "rounds_total" not in before
    status().save(path)
    after = figures(metrics.render())
    assert after["edge_refused_calls_total:403"] == 2
    assert after["edge_refused_calls_total:413"] == 1
    assert after["edge_refused_calls_total:401"] == 0
    assert after["edge_refused_calls_total:other"] == 1
    assert after["edge_bytes_total:in"] == 100
    assert after["edge_bytes_total:out"] == 100 + 4 * len("no")
    assert after["rounds_total"] == 3
    assert after["rounds_planned"] == 10
    assert after["quorum"] == 2
    assert after["sites_online"] == 3
    assert after["releases_valid_total"] == 6
    assert after["releases_dropped_total:no-answer"] == 1
    assert after["releases_dropped_total:invalid"] == 0
    assert after["last_round_seconds"] == 2.5
    assert (after["run:running"], after["run:finished"]) == (1, 0)


def test_no_figure_names_a_site_or_measures_the_model(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    status().save(path)
    text = (Metrics(path, lambda: 3).render() + path.read_bytes()).decode()
    assert not any(word in text for word in ("clinic", "0.875", "0.4375", "accuracy", "loss"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"state": "lost"}', b"\xff" * 2000])
def test_a_damaged_status_is_said_and_hides_no_other_figure(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "status.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="expected a run's status"):
        Status.load(path)
    shown = figures(Metrics(path, lambda: 3).render())
    assert shown["status_readable"] == 0
    assert shown["sites_enrolled"] == 3
    assert len([name for name in shown if name.startswith("edge_refused")]) == len(STATUSES) + 1


def test_the_figures_are_served_on_loopback_alone(tmp_path: Path) -> None:
    serving = Metrics(tmp_path / "status.json", lambda: 5).serve(0)
    try:
        assert serving.server.server_address[0] == "127.0.0.1"
        url = f"http://127.0.0.1:{serving.port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert figures(answer.read())["sites_enrolled"] == 5
        with pytest.raises(InputError, match=f"metrics: port {serving.port}: "):
            Metrics(tmp_path / "status.json", lambda: 5).serve(serving.port)
    finally:
        serving.stop()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=10)
