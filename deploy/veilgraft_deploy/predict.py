"""`veilgraft predict`: an exported model over local inputs, as CSV or JSON."""

import csv
import json
import sys
from pathlib import Path

from veilgraft.model.export import Prediction, load
from veilgraft_client import dataset


def predict(inputs: Path, model: Path, column: str | None, *, as_json: bool) -> None:
    """Print one line, or one JSON object, for each input.

    Raises:
        InputError: the model or the inputs can't be used.
    """
    trained = load(model)
    names, values = dataset.inputs(inputs, trained.facts.backbone.modality, column)
    found = list(zip(names, trained.predict(values), strict=True))
    if as_json:
        json.dump([_object(*pair) for pair in found], sys.stdout, indent=2, ensure_ascii=False)
        sys.stdout.write("\n")
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["input", "label", *trained.labels])
    for name, one in found:
        probabilities = [f"{one.probabilities[label]:.6f}" for label in trained.labels]
        writer.writerow([name, ";".join(one.labels), *probabilities])


def _object(name: str, one: Prediction) -> dict[str, object]:
    return {"input": name, "labels": one.labels, "probabilities": one.probabilities}
