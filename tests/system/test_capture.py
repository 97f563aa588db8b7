"""All that leaves a site, captured during a run and taken apart, against what SECURITY.md lists."""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.numpy
from tests.system import capture
from tests.system.capture import Call
from tests.system.digits import rows_of
from tests.system.federation import Federation

from veilgraft.invitation import Invitation
from veilgraft.messages import Envelope, Release, Reply

ROOT = Path(__file__).parents[2]
TAPS = Path(__file__).parent
SITES = ("a", "b")
WIRETAP = 9444
ENDS = "/v1/fleet/deactivate-node"
END_SECONDS = 300.0
ROUNDS = 1
LABELS, MEASURES = 10, 3
MEASURED = {
    "private": {"share": 0.3, "every": 1},
    "label_counts": {"share": 0.1},
}


@dataclass(frozen=True)
class Captured:
    """What left: for each site its requests, the messages in them, and where packets went."""

    calls: dict[str, list[Call]]
    replies: dict[str, list[tuple[Reply, Envelope]]]
    packets: dict[str, set[str]]
    edge: str
    head: dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def captured() -> Iterator[Captured]:
    """A whole run, from joining to leaving, of two sites whose data differ in one record."""
    rows = rows_of(SITES)
    other = rows["b"][-1]
    rows["b"] = rows["a"].copy()
    rows["b"][17] = other
    with Federation(
        sites=SITES, rounds=ROUNDS, rows=rows, sections={"evaluation": MEASURED}, up=False
    ) as federation:
        wiretap(federation)
        federation.wait_for(lambda: federation.report() is not None, END_SECONDS, "the report")
        for name in SITES:
            federation.stop(name)
        yield read(federation)


def wiretap(federation: Federation) -> None:
    """Bring it up with a recorder where the invitations lead, and a sniffer at each site."""
    federation.init()
    federation.start("coordinator")
    sniffers = [federation.folder / f"packets-{name}" for name in SITES]
    for name, out in zip(SITES, sniffers, strict=True):
        federation.program(name, f"sniffer-{name}", sys.executable, TAPS / "sniffer.py", out)
    federation.wait_until_up("coordinator")
    edge, folder = federation.hosts["coordinator"].address, federation.folder / "sent"
    folder.mkdir()
    address = (edge, WIRETAP, edge, federation.port)
    recorder = (sys.executable, TAPS / "recorder.py", *address)
    tls = federation.coordinator.tls
    federation.program("coordinator", "recorder", *recorder, tls, folder)
    federation.wait_for(lambda: all(map(Path.exists, sniffers)), 30, "the sniffers")
    federation.join(*SITES, invitations={name: leading(federation, name) for name in SITES})
    for name in SITES:
        federation.start(name)


def leading(federation: Federation, site: str) -> Path:
    """Return a site's invitation, leading to the recorder."""
    invitation = Invitation.read(federation.coordinator.invitation(site))
    coordinator = invitation.coordinator.model_copy(update={"port": WIRETAP})
    path = federation.folder / f"invitation-{site}.yaml"
    invitation.model_copy(update={"coordinator": coordinator}).write(path)
    return path


def read(federation: Federation) -> Captured:
    calls = {}
    for name in SITES:
        sent = (federation.folder / "sent").glob(f"{federation.hosts[name].address}.*")
        calls[name] = [call for path in sorted(sent) for call in capture.calls(path.read_bytes())]
    head = safetensors.numpy.load_file(federation.coordinator.run / "model" / "head.safetensors")
    packets = {}
    for name in SITES:
        lines = (federation.folder / f"packets-{name}").read_text().splitlines()
        assert lines[0] == "ready"
        packets[name] = set(lines[1:])
    return Captured(
        calls=calls,
        replies={name: list(capture.replies(each)) for name, each in calls.items()},
        packets=packets,
        edge=federation.hosts["coordinator"].address,
        head={name: array.shape for name, array in head.items()},
    )


def promised() -> dict[str, bool]:
    """Return the fields of SECURITY.md's table, and whether each is there in every run."""
    text = (ROOT / "SECURITY.md").read_text()
    (section,) = re.findall(r"\n## What leaves a site\n(.*?)(?=\n## |\Z)", text, re.DOTALL)
    rows = re.findall(r"^\| `([^`]+)` \| (always|rarely) \| [^|]+ \|$", section, re.MULTILINE)
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) == len(lines) - 2, "a row of the table is not of its form"
    assert len(dict(rows)) == len(rows), "a field has two rows"
    return {name: when == "always" for name, when in rows}


@pytest.mark.parametrize("site", SITES)
def test_all_packets_go_to_the_one_address_of_the_invitation(captured: Captured, site: str) -> None:
    there = captured.packets[site] - {"arp", "icmpv6"}
    assert there == {f"tcp {captured.edge}:{WIRETAP}"}


@pytest.mark.parametrize("site", SITES)
def test_what_is_sent_holds_the_fields_that_security_md_lists_and_no_other(
    captured: Captured, site: str
) -> None:
    found = {name for call in captured.calls[site] for name in capture.names(call)}
    found |= {name for each in captured.replies[site] for name in capture.said(*each)}
    listed = promised()
    assert found - listed.keys() == set()
    assert {name for name, always in listed.items() if always} - found == set()


def test_a_release_is_the_arrays_that_were_asked_for_and_nothing_else(captured: Captured) -> None:
    for replies in captured.replies.values():
        forms = []
        for reply, each in replies:
            if isinstance(reply, Release):
                arrays = safetensors.numpy.load(each.payload)
                assert {array.dtype.name for array in arrays.values()} == {"float64"}
                forms.append({name: array.shape for name, array in arrays.items()})
        assert captured.head in forms
        # A count for each label, and the two sums of an evaluation.
        rest = [form for form in forms if form != captured.head]
        assert {name for form in rest for name in form} == {"sums"}
        assert {form["sums"] for form in rest} == {(LABELS,), (MEASURES,)}


def test_nothing_tells_how_long_an_answer_took_to_compute(captured: Captured) -> None:
    for calls in captured.calls.values():
        pushed = [call.message for call in calls if call.path.endswith("/push-messages")]
        assert pushed
        assert {each for one in pushed for each in one.clientapp_runtime_list} == {0.0}


def test_one_record_more_or_less_changes_no_field_and_no_size(captured: Captured) -> None:
    requests, answers = defaultdict(set), defaultdict(set)
    for name in SITES:
        # Whether a SuperNode that ends can still say so depends on who ends first.
        running = [call for call in captured.calls[name] if call.path != ENDS]
        requests[name] = {capture.shape(call) for call in running}
        answers[name] = {
            (type(reply).__name__, len(each.header), len(each.payload), len(each.signature))
            for reply, each in captured.replies[name]
        }
    assert requests["a"] == requests["b"]
    assert answers["a"] == answers["b"]
    assert len(answers["a"]) > 3


def test_every_answer_is_signed_by_the_site(captured: Captured) -> None:
    for site, replies in captured.replies.items():
        assert {reply.site for reply, _ in replies} == {site}
        assert {len(each.signature) for _, each in replies} == {64}
