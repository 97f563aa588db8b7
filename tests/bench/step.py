"""A fused step at 384 × 10, batch 64, beside its two matrix products and its noise, and Opacus.

All on one thread, in turns, in one process. "Opacus directly" is a float32 `nn.Linear` in its own
`GradSampleModule` and `DPOptimizer`, with a batch of 64 that is already at hand.
"""

import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer

from veilgraft.model.features import units
from veilgraft.privacy.noise import NoiseSource
from veilgraft.study import Study
from veilgraft_client import engines
from veilgraft_client.engines import Engine

DIM, LABELS, BATCH, STEPS, TURNS = 384, 10, 64, 10, 200


def main() -> None:
    """Print medians, and ratios within this run."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    timed = {
        "two products": (_products(), 1),
        "noise": (_noise(), 1),
        "fused step": (_engine("fused"), STEPS),
        "our Opacus step": (_engine("opacus"), STEPS),
        "Opacus directly": (_opacus(), 1),
    }
    found: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(TURNS):
        for name, (run, steps) in timed.items():
            started = time.perf_counter()
            run()
            found[name].append((time.perf_counter() - started) / steps)
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, seconds in medians.items():
        print(f"{name:<18}{seconds * 1e6:>8.0f} µs")
    limit = medians["two products"] + medians["noise"]
    print(f"fused / (products + noise)  {medians['fused step'] / limit:.2f}")
    print(f"Opacus directly / fused     {medians['Opacus directly'] / medians['fused step']:.1f}")
    print(f"our Opacus / fused          {medians['our Opacus step'] / medians['fused step']:.1f}")


def _products() -> Callable[[], object]:
    draw = np.random.default_rng(0)
    values, weight = draw.normal(size=(BATCH, DIM)), draw.normal(size=(LABELS, DIM))
    residual = draw.normal(size=(BATCH, LABELS))
    return lambda: (values @ weight.T, residual.T @ values)


def _noise() -> Callable[[], object]:
    source = NoiseSource.fresh()
    return lambda: source.normal(LABELS * DIM + LABELS)


def _engine(engine: Engine) -> Callable[[], object]:
    study = Study.parse(
        {
            "name": "step",
            "purpose": "Time a step.",
            "task": {"labels": [str(label) for label in range(LABELS)]},
            "backbone": {"digest": "sha256:" + "0" * 64, "modality": "text", "pooling": "cls"},
            "privacy": {"noise_multiplier": 1.0},
            "training": {
                "algorithm": "dp-sgd",
                "rounds": 1,
                "learning_rate": 0.5,
                "sample_rate": 1 / STEPS,
                "local_epochs": 1,
            },
        },
        name="step",
    )
    draw, count = np.random.default_rng(0), BATCH * STEPS
    values = draw.normal(size=(count, DIM)).astype(np.float32)
    held = units(values, torch.from_numpy(draw.integers(0, LABELS, count)))
    trainer = engines.trainer(study, held, sigma=1.0, units=count, engine=engine)
    start = {"linear0.weight": np.zeros((LABELS, DIM)), "linear0.bias": np.zeros(LABELS)}

    def run() -> None:
        with NoiseSource.fresh() as source:
            trainer.update(start, 0.5, source)

    return run


def _opacus() -> Callable[[], object]:
    model = GradSampleModule(torch.nn.Linear(DIM, LABELS), loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.5),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=BATCH,
        loss_reduction="sum",
    )
    values, targets = torch.randn(BATCH, DIM), torch.randint(LABELS, (BATCH,))

    def run() -> None:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(values), targets, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return run


if __name__ == "__main__":
    main()
