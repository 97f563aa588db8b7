"""The exported model: loads again here and, where the form is the same, in `transformers`."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import veilgraft
import veilgraft_deploy.demo
from veilgraft.errors import InputError
from veilgraft.model import backbone as backbones
from veilgraft.model import export as exports
from veilgraft.model import head as heads
from veilgraft.model.backbone import FrozenBackbone
from veilgraft.study import Study

DEMO = Path(veilgraft_deploy.demo.__file__).parent


def study(**sections: Any) -> Study:
    values: dict[str, Any] = {
        "name": "s",
        "purpose": "p",
        "task": {"labels": ["a", "b", "c"]},
        "backbone": {
            "digest": backbones.digest(DEMO / "backbone"),
            "path": str(DEMO / "backbone"),
            "modality": "image",
            "pooling": "pooler",
            "standardise": True,
        },
        "privacy": {"epsilon": 3.0},
        "training": {"algorithm": "dp-gd", "rounds": 3, "learning_rate": 1.0},
    }
    return Study.parse({**values, **sections}, name="study.yaml")


def pictures(count: int = 5) -> list[bytes]:
    generator = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, (20, 17), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return encoded


def exported(folder: Path, contract: Study) -> heads.Arrays:
    assert contract.backbone.path is not None
    frozen = FrozenBackbone.open(contract.backbone.path, contract.backbone)
    shapes = heads.shapes(contract.head, frozen.dim, len(contract.task.labels))
    generator = np.random.default_rng(1)
    head = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    exports.export(folder, contract, frozen, head, ["A statement."], private=True)
    return head


def test_a_model_predicts_what_backbone_and_head_say(tmp_path: Path) -> None:
    contract = study()
    head = exported(tmp_path / "model", contract)
    model = veilgraft.load(tmp_path / "model")
    frozen = FrozenBackbone.open(DEMO / "backbone", contract.backbone)
    features = frozen.features(pictures()).double().numpy()
    logits = features @ head["linear0.weight"].T + head["linear0.bias"]
    np.testing.assert_allclose(model.logits(pictures()).numpy(), logits, atol=1e-6)
    found = model.predict(pictures())
    assert [one.labels for one in found] == [("abc"[row],) for row in logits.argmax(1)]
    for one in found:
        assert sum(one.probabilities.values()) == pytest.approx(1)


def test_predictions_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    exported(tmp_path / "model", study())
    model = veilgraft.load(tmp_path / "model")
    alone = torch.cat([model.logits([picture]) for picture in pictures()])
    torch.testing.assert_close(alone, model.logits(pictures(), batch_size=3), atol=1e-5, rtol=0)
    assert model.logits([]).shape == (0, 3)


def test_transformers_loads_the_folder_and_gives_the_same_logits(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    exported(tmp_path / "model", study())
    loaded = AutoModelForImageClassification.from_pretrained(
        tmp_path / "model", local_files_only=True
    ).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model", local_files_only=True)
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures()]
    with torch.inference_mode():
        logits = loaded(**processor(images, return_tensors="pt")).logits
    ours = veilgraft.load(tmp_path / "model").logits(pictures())
    torch.testing.assert_close(logits.double(), ours, atol=1e-3, rtol=1e-3)
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_head_without_a_transformers_form_still_loads_here(tmp_path: Path) -> None:
    contract = study(
        task={"type": "multilabel", "labels": ["a", "b", "c"]},
        head={"type": "mlp", "hidden": [8], "activation": "tanh"},
    )
    exported(tmp_path / "model", contract)
    assert not (tmp_path / "model" / "model.safetensors").exists()
    for one in veilgraft.load(tmp_path / "model").predict(pictures()):
        expected = tuple(label for label, p in one.probabilities.items() if p >= 0.5)
        assert one.labels == expected


def test_a_model_with_another_backbone_is_refused(tmp_path: Path) -> None:
    exported(tmp_path / "model", study())
    settings = tmp_path / "model" / "backbone" / "config.json"
    settings.write_text(settings.read_text() + " ")
    with pytest.raises(InputError, match=r"config\.json|backbone\.digest"):
        veilgraft.load(tmp_path / "model")


@pytest.mark.parametrize("missing", ["config.json", "head.safetensors"])
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, missing: str) -> None:
    exported(tmp_path / "model", study())
    (tmp_path / "model" / missing).unlink()
    with pytest.raises(InputError, match="expected an exported model"):
        veilgraft.load(tmp_path / "model")


def test_the_card_holds_the_statement_and_the_facts(tmp_path: Path) -> None:
    contract = study()
    exported(tmp_path / "model", contract)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "A statement." in card
    assert contract.digest in card
    facts = json.loads((tmp_path / "model" / "config.json").read_text())["veilgraft"]
    assert facts["digest"] == contract.digest
    assert facts["backbone"]["path"] is None
