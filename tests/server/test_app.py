"""The coordinator's app against sites that answer well, badly, wrongly or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp
from tests.server.grid import LocalGrid

from veilgraft import messages
from veilgraft.errors import QuorumError, Refusal
from veilgraft.messages import Envelope, Here, Refused, Release, Request
from veilgraft.model.score import Score
from veilgraft.study import Study
from veilgraft_server import app, checkpoint
from veilgraft_server.app import Job
from veilgraft_server.carrier import Flower
from veilgraft_server.checkpoint import Round

Answer = Callable[[Request, Envelope], Envelope]
DIM = 2


def study(quorum: int = 1, evaluation: dict[str, Any] | None = None, **training: Any) -> Study:
    return Study.parse(
        {
            "name": "s",
            "purpose": "p",
            "task": {"labels": ["a", "b"]},
            "backbone": {"digest": "sha256:" + "0" * 64, "modality": "text", "pooling": "cls"},
            "privacy": {"noise_multiplier": 1.0},
            "training": {"algorithm": "dp-gd", "rounds": 2, "learning_rate": 1.0, **training},
            "aggregation": {"quorum": quorum, "timeout": 0.3, "max_update_norm": 10.0},
            "evaluation": evaluation or {},
        },
        name="s",
    )


def update(value: float) -> bytes:
    return messages.pack(
        {"linear0.weight": np.full((2, DIM), value), "linear0.bias": np.full(2, value)}
    )


def released(answered: Request, asked: Envelope, payload: bytes, /, **changes: Any) -> Envelope:
    values = {
        "site": answered.site,
        "request": messages.digest(asked.header),
        "payload": messages.digest(payload),
    }
    return Envelope(Release.model_validate(values | changes).encode(), payload)


def good(value: float) -> Answer:
    return lambda request, asked: released(request, asked, update(value))


def sites(*answers: Answer) -> ClientApp:
    """Return a client app in which node i is the site `site-i` and gives the i-th answer."""
    app = ClientApp()

    @app.query()  # type: ignore[untyped-decorator]
    def hello(message: Message, context: Any) -> Message:
        if b'"label-counts"' in messages.from_record(message.content).header:
            return train(message, context)
        name = f"site-{context.node_config['partition-id']}"
        return Message(
            messages.to_record(
                Envelope(
                    Here(
                        site=name,
                        request=messages.digest(messages.from_record(message.content).header),
                    ).encode()
                )
            ),
            reply_to=message,
        )

    @app.evaluate()  # type: ignore[untyped-decorator]
    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Any) -> Message:
        asked = messages.from_record(message.content)
        answer = answers[context.node_config["partition-id"]]
        reply = answer(Request.decode(asked.header), asked)
        return Message(messages.to_record(reply), reply_to=message)

    return app


def run(
    tmp_path: Path, contract: Study, *answers: Answer, accuracy: float | None = None
) -> list[Round]:
    told: list[Round] = []
    job = Job(
        study=contract,
        run="r",
        dim=DIM,
        checkpoint=tmp_path / "checkpoint.safetensors",
        generator=np.random.default_rng(0),
        evaluate=lambda _: None if accuracy is None else Score(accuracy, 1.0, 10),
        tell=told.append,
    )
    app.run(job, Flower(LocalGrid(sites(*answers), len(answers))))
    return told


def weight(tmp_path: Path, contract: Study) -> float:
    progress = checkpoint.load(tmp_path / "checkpoint.safetensors", contract.digest)
    return float(progress.state.head["linear0.weight"][0, 0])


def test_releases_are_averaged_round_by_round(tmp_path: Path) -> None:
    told = run(tmp_path, study(), good(1.0), good(3.0), accuracy=0.5)
    assert [(r.round, r.sites, r.dropped, r.accuracy) for r in told] == [
        (1, 2, 0, 0.5),
        (2, 2, 0, 0.5),
    ]
    assert weight(tmp_path, study()) == -4.0
    assert told[0].epsilon is not None
    assert told[1].epsilon is not None
    assert told[1].epsilon > told[0].epsilon


BAD: dict[str, tuple[Answer, str]] = {
    "not a number": (good(float("nan")), "expected finite numbers"),
    "too large": (good(1e3), "L2 norm of at most 10"),
    "another shape": (
        lambda r, a: released(
            r, a, messages.pack({"linear0.weight": np.ones((2, 1)), "linear0.bias": np.ones(2)})
        ),
        "expected float64 [2, 2], got float64 [2, 1]",
    ),
    "another site's name": (lambda r, a: released(r, a, update(1), site="site-0"), "the site"),
    "another payload": (
        lambda r, a: released(r, a, update(1), payload="sha256:" + "0" * 64),
        "does not fit the payload",
    ),
    "an answer to another request": (
        lambda r, a: released(r, a, update(1), request="sha256:" + "0" * 64),
        "answers another request",
    ),
    "a refusal": (
        lambda r, a: Envelope(
            Refused(
                site=r.site, request=messages.digest(a.header), code=Refusal.UNAVAILABLE
            ).encode()
        ),
        "refused: unavailable",
    ),
    "no message of ours": (lambda r, a: Envelope(b"{}", b""), "Unable to extract tag"),
    "no arrays": (lambda r, a: released(r, a, b"nonsense"), "expected safetensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_is_dropped_and_reported_and_changes_nothing(
    tmp_path: Path, name: str
) -> None:
    answer, reason = BAD[name]
    told = run(tmp_path, study(), good(1.0), answer)
    assert [(r.sites, r.dropped) for r in told] == [(1, 1), (1, 1)]
    assert told[0].drops[0].site == "site-1"
    assert reason in told[0].drops[0].reason
    assert weight(tmp_path, study()) == -2.0


def test_below_quorum_the_run_stops_and_keeps_the_rounds_before(tmp_path: Path) -> None:
    contract = study(quorum=2)

    def fails_later(request: Request, asked: Envelope) -> Envelope:
        return released(request, asked, update(1.0 if request.round == 1 else float("inf")))

    with pytest.raises(QuorumError, match=r"round 2: 1 valid releases, aggregation.quorum is 2"):
        run(tmp_path, contract, good(1.0), fails_later)
    progress = checkpoint.load(tmp_path / "checkpoint.safetensors", contract.digest)
    assert progress.state.round == len(progress.history) == 1


def test_too_few_nodes_are_waited_for_and_no_longer_than_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(QuorumError, match=r"1 sites ready after 0.3 s; aggregation\.quorum is 3"):
        run(tmp_path, study(quorum=3), good(1.0))


def test_a_run_that_is_called_again_goes_on_where_it_was(tmp_path: Path) -> None:
    contract, asked = study(quorum=1), []

    def once(request: Request, envelope: Envelope) -> Envelope:
        asked.append(request.round)
        if len(asked) == 2:
            return Envelope(b"", b"")
        return released(request, envelope, update(1.0))

    with pytest.raises(QuorumError):
        run(tmp_path, contract, once)
    run(tmp_path, contract, once)
    assert asked == [1, 2, 2]
    assert weight(tmp_path, contract) == -2.0


def test_plateau_is_driven_by_the_public_accuracy(tmp_path: Path) -> None:
    rates: list[float] = []

    def seen(request: Request, asked: Envelope) -> Envelope:
        rates.append(request.rate)
        return released(request, asked, update(0.0))

    contract = study(rounds=6, schedule="plateau", patience=2)
    run(tmp_path, contract, seen, accuracy=0.5)
    assert rates == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25]


MEASURED = {"private": {"noise_multiplier": 0.01, "every": 2}}


def measuring(sums: Callable[[int], list[float]]) -> Answer:
    """Answer evaluations with these sums, and all else with updates of zero."""

    def answer(request: Request, asked: Envelope) -> Envelope:
        if request.kind == "update":
            return released(request, asked, update(0.0))
        return released(request, asked, messages.pack({"sums": np.array(sums(request.round))}))

    return answer


def test_sites_are_asked_to_evaluate_when_the_study_says_so(tmp_path: Path) -> None:
    contract = study(evaluation=MEASURED, rounds=5)
    one, other = measuring(lambda _: [30.0, 5.0, 40.0]), measuring(lambda _: [50.0, 5.0, 60.0])
    told = run(tmp_path, contract, one, other)
    assert [round_.accuracy is None for round_ in told] == [True, False, True, False, False]
    assert told[1].accuracy == pytest.approx(0.8)
    assert told[1].loss == pytest.approx(0.4)
    assert told[1].low is not None
    assert told[1].high is not None
    assert 0.7 < told[1].low < 0.8 < told[1].high < 0.9


def test_the_head_that_is_evaluated_is_the_one_that_would_be_exported(tmp_path: Path) -> None:
    contract, heads = study(evaluation=MEASURED), []

    def seen(request: Request, asked: Envelope) -> Envelope:
        if request.kind == "update":
            return released(request, asked, update(float(request.round)))
        heads.append(
            messages.unpack(asked.payload, {"linear0.weight": (2, DIM), "linear0.bias": (2,)})
        )
        return released(request, asked, messages.pack({"sums": np.array([1.0, 1.0, 2.0])}))

    run(tmp_path, contract, seen)
    # After two rounds: steps of -1 and -2, and the last iterate alone is averaged.
    assert heads[0]["linear0.weight"][0, 0] == -3.0


@pytest.mark.parametrize(
    "sums",
    [[1.0, 2.0], [float("nan"), 1.0, 1.0], [1e9, 0.0, 10.0]],
    ids=["another shape", "not a number", "more units than a site may have"],
)
def test_a_bad_evaluation_is_left_out(tmp_path: Path, sums: list[float]) -> None:
    contract = study(evaluation=MEASURED)
    told = run(
        tmp_path, contract, measuring(lambda _: [30.0, 5.0, 40.0]), measuring(lambda _: sums)
    )
    assert told[1].accuracy == 0.75
    assert told[1].dropped == 0
    (tmp_path / "alone").mkdir()
    alone = run(tmp_path / "alone", contract, measuring(lambda _: sums))
    assert alone[1].accuracy is None


def test_plateau_is_driven_by_the_private_accuracy(tmp_path: Path) -> None:
    rates: list[float] = []
    sums = measuring(lambda round_: [30.0 if round_ > 2 else 20.0, 5.0, 40.0])

    def seen(request: Request, asked: Envelope) -> Envelope:
        if request.kind == "update":
            rates.append(request.rate)
        return sums(request, asked)

    contract = study(
        evaluation={"private": {"noise_multiplier": 1e-3, "every": 1}},
        rounds=6, schedule="plateau", patience=2,
    )  # fmt: skip
    run(tmp_path, contract, seen)
    # .5, .5, .75 and then nothing better: halved before the sixth round.
    assert rates == [1.0, 1.0, 1.0, 1.0, 1.0, 0.5]


def test_labels_are_counted_once_before_the_first_round(tmp_path: Path) -> None:
    contract = study(evaluation={"label_counts": {"noise_multiplier": 1.0}})
    asked: list[tuple[str, int]] = []

    def seen(request: Request, envelope: Envelope) -> Envelope:
        asked.append((request.kind, request.round))
        if request.kind == "update":
            return released(request, envelope, update(0.0))
        return released(request, envelope, messages.pack({"sums": np.array([3.5, -0.25])}))

    run(tmp_path, contract, seen)
    assert asked == [("label-counts", 0), ("update", 1), ("update", 2)]
    progress = checkpoint.load(tmp_path / "checkpoint.safetensors", contract.digest)
    assert progress.labels == {"site-0": [3.5, -0.25]}
