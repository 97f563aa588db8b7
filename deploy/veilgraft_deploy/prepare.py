"""`veilgraft backbone prepare`: a folder that a study can pin."""

import shutil
from pathlib import Path
from typing import Any, Literal

from veilgraft.errors import InputError
from veilgraft.model import backbone as backbones
from veilgraft.study import Backbone, Preprocessing
from veilgraft_client import dataset


def prepare(
    folder: Path,
    out: Path,
    public: Path | None,
    *,
    pooling: Literal["cls", "mean", "pooler"],
    column: str | None,
    size: int | None,
    max_length: int,
) -> dict[str, Any]:
    """Copy a model folder, measure statistics on public records if given; return its facts.

    Raises:
        InputError: the folder or the records can't be used; `out` is then not there.
    """
    modality = backbones.modality(folder)
    values = None
    if public is not None:
        _, values = dataset.inputs(public, modality, column)
    digest = backbones.prepare(folder, out)
    if values is not None:
        spec = Backbone(
            digest=digest,
            modality=modality,
            pooling=pooling,
            max_length=max_length,
            preprocessing=Preprocessing(size=size) if size else None,
        )
        try:
            digest = backbones.write_statistics(out, spec, values)
        except InputError:
            if not out.samefile(folder):
                shutil.rmtree(out)
            raise
    return {"folder": str(out), "digest": digest, "modality": modality}
