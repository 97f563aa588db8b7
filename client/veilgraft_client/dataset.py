"""A site's local files become records in memory.

What comes out is typed and complete: every record has an input, its labels are labels of the
study, and its unit has a name. Nothing is cached or written. Messages name files, places, columns
and labels for the site's own console; none of them may leave the site.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from veilgraft.errors import InputError
from veilgraft.model import images
from veilgraft.study import DataSource, Task
from veilgraft_client import formats
from veilgraft_client.formats import Format, Rows

if TYPE_CHECKING:
    import datasets

Modality = Literal["text", "image"]

TOLD = 20
"""Skipped rows that are told one by one; the rest are told as a count."""

LONGEST_ID = 1_000
"""Characters of an id; what is longer is no name but a slip of the columns."""

MOST_LABELS = 100
"""A column with more distinct values is not taken for one of labels."""

_IdType = Literal["text", "integer"]

# Digits of other scripts are refused: `int` would read them, and no one else may.
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")

_LABEL_NAMES = ("label", "labels", "target", "class", "category", "diagnosis", "y")


@dataclass(frozen=True)
class Records:
    """Labelled inputs in memory, in the order of the file.

    Attributes:
        table: `input` (large_string: the text; or large_binary: the image as it is encoded),
            `label` (int64, an index into the study's labels; or, where a record may have many,
            a list<float32>[labels] of ones and zeros) and, where asked for, `unit` and
            `partition` (string). No cell is null.
        bad: rows that were skipped on reading.
    """

    table: pa.Table
    bad: int = 0

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def select(self, rows: npt.NDArray[np.integer[Any]]) -> "Records":
        """Return the records at these indices, in this order; none of them counts as bad."""
        return Records(self.table.take(pa.array(rows, pa.int64())))

    @property
    def inputs(self) -> list[Any]:
        """The texts, or the images as encoded bytes."""
        values: list[Any] = self.table["input"].to_pylist()
        return values

    @cached_property
    def targets(self) -> npt.NDArray[Any]:
        """The labels: int64 (records,), or float32 (records, labels) where there may be many."""
        labels = self.table["label"].combine_chunks()
        if types.is_fixed_size_list(labels.type):
            flat = np.array(np.from_dlpack(labels.flatten()))
            return flat.reshape(len(self), labels.type.list_size)
        return np.array(np.from_dlpack(labels))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the inputs in order, each after its length (8 bytes, big endian).

        Labels and units are not part of it. It tells whether two data sets are the same and so
        never leaves the site.
        """
        digest = hashlib.sha256()
        for value in self.table["input"]:
            data = value.as_buffer()
            digest.update(data.size.to_bytes(8, "big"))
            digest.update(data)
        return digest.hexdigest()

    def dataset(self) -> "datasets.Dataset":
        """Return the same table as a Hugging Face data set in memory, for partitioners."""
        # Not at the top: the import takes most of a second.
        from datasets import Dataset

        return Dataset(self.table)


@dataclass(frozen=True)
class Description:
    """What a look at a data path tells.

    Attributes:
        rows: of the file, bad ones included, or the number of files.
        inputs: columns that may hold the input, the likeliest first.
        label_columns: columns that may hold the label, the likeliest first.
        labels: distinct values of the first of these; none where there is no such column.
    """

    format: Format
    modality: Modality
    rows: int
    inputs: tuple[str, ...]
    label_columns: tuple[str, ...]
    labels: tuple[str, ...]


def _unheard(line: str) -> None:
    """Tell nobody; `Records.bad` still holds the count."""


def read(
    source: DataSource,
    task: Task,
    *,
    modality: Modality,
    unit: str | None = None,
    partition: str | None = None,
    tell: Callable[[str], None] = _unheard,
) -> Records:
    """Return the records that `source` names.

    A label matches a label of the study by name, after outer space is dropped, or else by index
    from 0; where any label's name is itself an integer, by name alone. A multi-label cell is a
    list, or text split at `source.separator`; an empty one means no label.

    A **bad record** is a row that doesn't parse, an input that is empty or can't be decoded, a
    missing label, a unit or partition that is empty or longer than 1,000 characters, or a unit
    that is no whole number where `source.unit_type` is `integer`. With
    `source.on_bad_record: skip` it is left out, told and counted. A label that the study doesn't
    have is no such record: the data are not what the study says, and reading fails whatever
    `on_bad_record` is.

    Args:
        source: a file, a folder of images, or `digits`.
        task: whose labels are meant.
        modality: what an input is, and the column `input` by default: `text` or `image`.
        unit: the column that names the protected person; its values are stripped and put into
            Unicode's form NFC, so that one person is not taken for two. Where `source.unit_type`
            is `integer`, they are whole numbers in ASCII digits and compared as such.
        partition: the column by which a simulation splits; treated as a `unit` of text is.
        tell: is given a line for each of the first 20 skipped rows, and one for the rest; a
            line holds the row's place and never its content.

    Raises:
        InputError: one sentence that names the file, what was expected and what came.
    """
    ids = {role: name for role, name in (("unit", unit), ("partition", partition)) if name}
    rows = _rows(source, task.labels, modality, ids)
    faults: dict[int, str] = {}
    labels = _labels(rows, task, source.separator, faults)
    kinds: dict[str, _IdType] = {"unit": source.unit_type}
    named = {role: _ids(rows, role, kinds.get(role, "text"), faults) for role in ids}
    table = pa.table({"input": _inputs(rows, modality, faults), "label": labels, **named})
    bad = _bad(rows, faults)
    if bad and source.on_bad_record == "fail":
        raise _first_bad(rows, bad, "; on_bad_record: skip leaves them out")
    if len(faults) == table.num_rows:
        came = f"{len(bad)} bad records alone" if bad else "none"
        raise InputError(f"{rows.origin}: expected at least one record, got {came}")
    _tell_bad(rows, bad, tell)
    if faults:
        table = table.take(pa.array([i for i in range(table.num_rows) if i not in faults]))
    return Records(table, len(bad))


def inputs(
    path: Path, modality: Modality, column: str | None = None
) -> tuple[list[str], list[str] | list[bytes]]:
    """Return where each input stands, and the texts or encoded images, with no labels read.

    Args:
        path: a file as `read` takes it, or one image, or a folder of images however deep.
        modality: what an input is.
        column: of a file; `text` or `image` unless named.

    Raises:
        InputError: the path can't be read, or any of its inputs is a bad record.
    """
    if path.is_dir() or path.suffix.lower() in formats.IMAGE_SUFFIXES:
        _check_modality(str(path), modality, "images")
        files = formats.loose_images(path)
        rows = formats.read_images(path if path.is_dir() else path.parent, files)
    else:
        format_ = formats.format_of(path)
        _check_modality(str(path), modality, format_)
        rows = _table(path, format_, {"input": column or modality})
    faults: dict[int, str] = {}
    found = _inputs(rows, modality, faults)
    if bad := _bad(rows, faults):
        raise _first_bad(rows, bad)
    return [rows.name(place) for place in rows.places], found.to_pylist()


def describe(path: Path) -> Description:
    """Return what a look at a file, or a folder `LABEL/file`, tells, for a draft of a study.

    Raises:
        InputError: the path can't be read, or holds neither text nor images.
    """
    format_ = formats.format_of(path)
    if format_ == "images":
        folders = formats.image_folders(path)
        count = sum(len(files) for files in folders.values())
        return Description(format_, "image", count, ("image",), ("label",), _sorted(set(folders)))
    rows, pictures = formats.glance(path, format_)
    classes = _classes(rows.table)
    texts = [f.name for f in rows.table.schema if _is_text(f.type) and f.name not in classes]
    texts.sort(key=lambda name: (name != "text", -_mean_length(rows.table[name])))
    if not pictures and not texts:
        raise InputError(f"{path}: expected a column of texts or images, got none")
    return Description(
        format_,
        "image" if pictures else "text",
        len(rows.places) + len(rows.bad),
        tuple(sorted(pictures, key=lambda name: name != "image") or texts),
        tuple(classes),
        _sorted(next(iter(classes.values()), set())),
    )


def _classes(table: pa.Table) -> dict[str, set[str]]:
    """Return the values of each column that may hold labels, the likeliest column first.

    Values that seldom recur tell records apart, not classes, unless the column's name says so.
    """
    found = {name: _distinct(table[name]) for name in table.column_names}
    named = [name for name in _LABEL_NAMES if name in found]
    recurring = [name for name in found if 2 * len(found[name]) <= table.num_rows]
    likely = dict.fromkeys(named + recurring)
    return {name: found[name] for name in likely if 2 <= len(found[name]) <= MOST_LABELS}


def _distinct(column: pa.ChunkedArray) -> set[str]:
    """Return the values that are not empty; none where they can't be written as text."""
    try:
        flat = pc.list_flatten(column) if _is_list(column.type) else column
        values = pc.unique(flat.cast(pa.string())).to_pylist()
    except pa.ArrowException:
        return set()
    return {value.strip() for value in values if value and value.strip()}


def _mean_length(column: pa.ChunkedArray) -> float:
    return pc.mean(pc.utf8_length(column.cast(pa.large_string()))).as_py() or 0.0


def _sorted(names: set[str]) -> tuple[str, ...]:
    """Return labels in order; by number where all of them are numbers."""
    digits = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if digits else 0, name)))


def _rows(
    source: DataSource, labels: Sequence[str], modality: Modality, ids: Mapping[str, str]
) -> Rows:
    if source.path is None:
        if modality != "image":
            raise InputError(f"source digits: holds images, and {modality} was expected")
        _check_no_ids("source digits", ids)
        return formats.read_digits()
    path, format_ = source.path, formats.format_of(source.path, source.format)
    _check_modality(str(path), modality, format_)
    if format_ != "images":
        return _table(
            path, format_, {"input": source.input or modality, "label": source.label, **ids}
        )
    _check_no_ids(str(path), ids)
    folders = formats.image_folders(path)
    codes = _codes(labels)
    if unknown := [repr(name) for name in folders if _normal(name) not in codes]:
        raise InputError(
            f"{path}: expected folders named by the study's labels {_few(labels)}, "
            f"got {_few(unknown)}"
        )
    return formats.read_images(path, [file for files in folders.values() for file in files])


def _table(path: Path, format_: Format, columns: Mapping[str, str]) -> Rows:
    match format_:
        case "csv":
            return formats.read_csv(path, columns)
        case "jsonl":
            return formats.read_jsonl(path, columns)
        case _:
            return formats.read_parquet(path, columns)


def _check_modality(origin: str, modality: Modality, format_: Format) -> None:
    suits = {"text": ("csv", "jsonl", "parquet"), "image": ("parquet", "images")}[modality]
    if format_ not in suits:
        expected = " or ".join(formats.NOUNS[f] for f in formats.NOUNS if f in suits)
        raise InputError(
            f"{origin}: for {modality}s expected {expected}, got {formats.NOUNS[format_]}"
        )


def _check_no_ids(origin: str, ids: Mapping[str, str]) -> None:
    if ids:
        names = " and ".join(repr(name) for name in ids.values())
        raise InputError(f"{origin}: expected a file with a column {names}; images have none")


def _bad(rows: Rows, faults: Mapping[int, str]) -> dict[int, str]:
    """Return the cause of every bad record by its place: those that did not parse, and the rest."""
    return {**rows.bad, **{rows.places[i]: why for i, why in faults.items()}}


def _first_bad(rows: Rows, bad: Mapping[int, str], hint: str = "") -> InputError:
    first, total = min(bad), len(rows.places) + len(rows.bad)
    return InputError(
        f"{rows.at(first)}: {bad[first]}; {len(bad)} of {total} records are bad{hint}"
    )


def _tell_bad(rows: Rows, bad: Mapping[int, str], tell: Callable[[str], None]) -> None:
    for place in sorted(bad)[:TOLD]:
        tell(f"{rows.at(place)}: {bad[place]}; skipped")
    if len(bad) > TOLD:
        tell(f"{rows.origin}: {len(bad) - TOLD} more bad records skipped")


def _inputs(rows: Rows, modality: Modality, faults: dict[int, str]) -> pa.ChunkedArray:
    return _texts(rows, faults) if modality == "text" else _images(rows, faults)


def _texts(rows: Rows, faults: dict[int, str]) -> pa.ChunkedArray:
    column = rows.table["input"]
    if not _is_text(column.type):
        raise InputError(f"{rows.origin}: expected text as input, got {column.type}")
    # Large: a data set may exceed the 2 GiB that offsets of 32 bits can reach.
    column = column.cast(pa.large_string())
    lengths = pc.utf8_length(pc.utf8_trim_whitespace(column))
    empty = pc.or_kleene(pc.is_null(lengths), pc.invert(lengths.cast(pa.bool_())))
    for i in pc.indices_nonzero(empty).to_pylist():
        faults.setdefault(i, "the text is empty")
    return column


def _images(rows: Rows, faults: dict[int, str]) -> pa.ChunkedArray:
    column = rows.table["input"]
    if not formats.is_image(column.type):
        raise InputError(f"{rows.origin}: expected encoded images as input, got {column.type}")
    if types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    column = column.cast(pa.large_binary())
    for i, data in enumerate(column):
        try:
            if data.is_valid:
                images.decode(data.as_py())
            else:
                faults.setdefault(i, "the image is missing")
        except InputError as error:
            faults.setdefault(i, str(error))
    return column


def _ids(rows: Rows, role: str, kind: _IdType, faults: dict[int, str]) -> pa.Array:
    column = rows.table[role]
    # Fractions are refused: 12 and 12.0 would be one person under two names.
    if not (_is_text(column.type) or types.is_integer(column.type)):
        raise InputError(f"{rows.origin}: expected text or integers as {role}, got {column.type}")
    names = [_normal(name or "") for name in column.cast(pa.string()).to_pylist()]
    for i, name in enumerate(names):
        if why := _id_fault(name, role, kind):
            faults.setdefault(i, why)
        elif kind == "integer":
            names[i] = str(int(name))
    return pa.array(names, pa.string())


def _id_fault(name: str, role: str, kind: _IdType) -> str | None:
    """Return why this is no id, without a word of what it holds; None where it is one."""
    if not name:
        return f"the {role} is empty"
    if len(name) > LONGEST_ID:
        return f"expected at most {LONGEST_ID:,} characters as the {role}, got more"
    if kind == "integer" and not _WHOLE_NUMBER.fullmatch(name):
        return f"expected a whole number as the {role}"
    return None


def _labels(rows: Rows, task: Task, separator: str, faults: dict[int, str]) -> pa.Array:
    codes = _codes(task.labels)
    found: list[list[int]] = []
    for i, names in enumerate(_label_names(rows, task, separator)):
        if names is None or not all(names):
            faults.setdefault(i, "the label is missing")
            found.append([0])
        elif unknown := [name for name in names if name not in codes]:
            raise InputError(
                f"{rows.at(rows.places[i])}: expected one of the study's labels "
                f"{_few(task.labels)}, got {_short(unknown[0])}"
            )
        else:
            found.append([codes[name] for name in names])
    if task.type != "multilabel":
        return _numbers(np.array([code for (code,) in found], np.int64))
    hot = np.zeros((len(found), len(task.labels)), np.float32)
    for i, each in enumerate(found):
        hot[i, each] = 1
    return pa.FixedSizeListArray.from_arrays(_numbers(hot.ravel()), len(task.labels))


def _numbers(values: npt.NDArray[np.generic]) -> pa.Array:
    """Return what `pa.array` does, which imports pandas: a fifth of a second and 30 MiB."""
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _label_names(rows: Rows, task: Task, separator: str) -> list[list[str] | None]:
    """Return each row's labels as they are written; None, or an empty name, where it has none."""
    column = rows.table["label"]
    listed = _is_list(column.type)
    if listed and task.type != "multilabel":
        raise InputError(f"{rows.origin}: expected one label a row, got {column.type}")
    try:
        cells = column.cast(pa.list_(pa.string()) if listed else pa.string()).to_pylist()
    except pa.ArrowException:
        raise InputError(
            f"{rows.origin}: expected text or integers as label, got {column.type}"
        ) from None
    if listed:
        return [cell and [_normal(name or "") for name in cell] for cell in cells]
    if task.type != "multilabel":
        return [[_normal(cell or "")] for cell in cells]
    return [
        None
        if cell is None
        else [name for part in cell.split(separator) if (name := _normal(part))]
        for cell in cells
    ]


def _codes(labels: Sequence[str]) -> dict[str, int]:
    """Return the index of each way to write a label.

    Indices are left out where a label is named by an integer: with labels 1 and 2, a file of 0
    and 1 would otherwise be read as all of one class.
    """
    names = {_normal(label): i for i, label in enumerate(labels)}
    if any(re.fullmatch(r"[+-]?\d+", name) for name in names):
        return names
    return names | {str(i): i for i in range(len(labels))}


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())


def _is_text(type_: pa.DataType) -> bool:
    value = type_.value_type if types.is_dictionary(type_) else type_
    kinds = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(is_kind(value) for is_kind in kinds)


def _is_list(type_: pa.DataType) -> bool:
    kinds = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    return any(is_kind(type_) for is_kind in kinds)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:TOLD]) + (f" and {len(names) - TOLD} more" if len(names) > TOLD else "")


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:79] + "…")
