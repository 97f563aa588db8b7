"""Local files become rows of cells: one reader for each format, and nothing judged yet.

Only the files that are named are opened, nothing is written, and no reader reaches the network.
A row that does not parse is noted with its place and left out; a file that does not parse is an
`InputError` of one sentence.
"""

import csv
import gzip
import importlib.util
import io
import json
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from PIL import Image
from pyarrow import types

from veilgraft.errors import InputError

Format = Literal["csv", "jsonl", "parquet", "images"]

NOUNS: Mapping[Format, str] = {
    "csv": "a CSV file",
    "jsonl": "a JSONL file",
    "parquet": "a Parquet file",
    "images": "a folder of images (LABEL/file)",
}
_SUFFIXES: Mapping[str, Format] = {
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_SPLITS = {"dev", "test", "train", "training", "val", "valid", "validation"}
_END = "end of the file"


@dataclass(frozen=True)
class Rows:
    """What a reader found.

    Attributes:
        origin: the file or folder, as messages name it.
        table: one column for each role that was asked for, of the type that the file has.
        places: for each row of `table`, where it stands: the row of a CSV file (the header is
            row 1, blank lines don't count) or of a Parquet file (from 1), the line of a JSONL
            file, or an index into `names`.
        bad: place and cause of each row that did not parse; never what it holds.
        noun: what `places` count.
        names: of the image files, relative to the folder.
    """

    origin: str
    table: pa.Table
    places: Sequence[int]
    bad: Mapping[int, str]
    noun: str = "row"
    names: Sequence[str] = ()

    def name(self, place: int) -> str:
        """Return where a row stands within its file or folder."""
        return self.names[place] if self.names else f"{self.noun} {place}"

    def at(self, place: int) -> str:
        """Return where a row stands, for a message."""
        return f"{self.origin}: {self.name(place)}"


def format_of(path: Path, given: Format | None = None) -> Format:
    """Return the format that is `given`, or else told by the path's suffix.

    Raises:
        InputError: nothing is there, the suffix is unknown, or there is a folder where a file
            was expected or the other way round.
    """
    with _reading(path):
        folder = stat.S_ISDIR(path.stat().st_mode)
    suffixes = [s.lower() for s in path.suffixes if s.lower() != ".gz"]
    told = "images" if folder else _SUFFIXES.get(suffixes[-1] if suffixes else "")
    found = given or told
    if found is None:
        known = ", ".join(_SUFFIXES)
        raise InputError(f"{path}: expected a folder of images or a file named {known}")
    if folder != (found == "images"):
        raise InputError(f"{path}: expected {NOUNS[found]}, got a {'folder' if folder else 'file'}")
    return found


def read_csv(path: Path, columns: Mapping[str, str] | None) -> Rows:
    """Read a CSV file in UTF-8, with a header; every cell is text, as it stands.

    Args:
        path: may be compressed with gzip, as may that of `read_jsonl`.
        columns: for each role the column to read; all columns, by their own names, if None.
    """
    data = _contents(path, "csv")
    names = _header(path, data)
    wanted = _wanted(path, columns, names)
    # One row too long to be right: a quote that is never closed would swallow it.
    end = _END + "," * len(names)
    bad: dict[int, str] = {}
    closed = False

    def note(row: Any) -> str:
        nonlocal closed
        if row.text == end:
            closed = True
        else:
            bad[row.number] = f"expected {row.expected_columns} cells, got {row.actual_columns}"
        return "skip"

    cells = _parse_csv(path, data + f"\n{end}\n".encode(), set(wanted.values()), note)
    last = 1 + cells.num_rows + len(bad)
    if not closed:
        raise InputError(f"{path}: row {last}: a quoted cell is never closed")
    places = [row for row in range(2, last + 1) if row not in bad]
    table = pa.table({role: cells[name] for role, name in wanted.items()})
    return Rows(str(path), table, places, bad)


def _parse_csv(path: Path, data: bytes, names: set[str], note: Any) -> pa.Table:
    try:
        return pa.csv.read_csv(
            pa.BufferReader(data),
            # Rows are numbered by the serial reader alone, and must not straddle two blocks.
            pa.csv.ReadOptions(use_threads=False, block_size=min(len(data) + 1, 2**31 - 1)),
            pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
            pa.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), include_columns=sorted(names)
            ),
        )
    except pa.ArrowException:
        raise InputError(f"{path}: expected a CSV file, got what can't be parsed as one") from None


def _header(path: Path, data: bytes) -> Sequence[str]:
    try:
        rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        return next((row for row in rows if row), [])
    except csv.Error:
        raise InputError(f"{path}: expected a CSV file with a header row, got none") from None


def read_jsonl(path: Path, columns: Mapping[str, str]) -> Rows:
    """Read one JSON object a line; numbers and booleans become their JSON text.

    A wanted value is text, an integer, a boolean, null, or a list of those; a line that holds
    anything else, or no object at all, is a bad row. Blank lines are passed over.
    """
    objects, bad = _objects(path)
    wanted = _wanted(path, columns, list(dict.fromkeys(key for o in objects.values() for key in o)))
    rows: dict[int, list[Any]] = {}
    for line, values in objects.items():
        try:
            rows[line] = [_plain(values.get(name)) for name in wanted.values()]
        except ValueError:
            bad[line] = "expected text, integers, or lists of them"
    table = pa.table(
        {role: _column([r[i] for r in rows.values()]) for i, role in enumerate(wanted)}
    )
    return Rows(str(path), table, list(rows), bad, noun="line")


def _objects(path: Path) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """Return the objects of a JSONL file by line, and the cause of each line that is none."""
    objects: dict[int, dict[str, Any]] = {}
    bad: dict[int, str] = {}
    text = _contents(path, "jsonl").decode("utf-8-sig")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            bad[number] = "not valid JSON"
            continue
        if isinstance(value, dict):
            objects[number] = value
        else:
            bad[number] = "expected a JSON object"
    if not objects:
        raise InputError(f"{path}: expected one JSON object a line, got none")
    return objects, bad


def _all_of_jsonl(path: Path) -> Rows:
    objects, bad = _objects(path)
    names = dict.fromkeys(key for values in objects.values() for key in values)
    cells = {name: [_plain_or_none(o.get(name)) for o in objects.values()] for name in names}
    table = pa.table({name: _column(cells[name]) for name in names})
    return Rows(str(path), table, list(objects), bad, noun="line")


def _plain_or_none(value: object) -> Any:
    try:
        return _plain(value)
    except ValueError:
        return None


def _plain(value: object) -> Any:
    """Return a JSON value as text, None or a list of those; raise ValueError on others.

    A fraction is refused: 12 and 12.0 would be one person under two names.
    """
    match value:
        case None:
            return None
        case str():
            value.encode()  # a lone surrogate is a ValueError here, not somewhere in Arrow
            return value
        case bool() | int():
            return json.dumps(value)
        case list() if not any(isinstance(item, list) for item in value):
            return [_plain(item) for item in value]
    raise ValueError


def _column(cells: Sequence[Any]) -> pa.Array:
    """Return cells of `_plain` as a column of text, or of lists of text if any is a list."""
    if not any(isinstance(cell, list) for cell in cells):
        return pa.array(cells, pa.string())
    lists = [cell if cell is None or isinstance(cell, list) else [cell] for cell in cells]
    return pa.array(lists, pa.list_(pa.string()))


def read_parquet(path: Path, columns: Mapping[str, str]) -> Rows:
    """Read the wanted columns of a Parquet file, and no others."""
    wanted = _wanted(path, columns, parquet_schema(path).names)
    try:
        with pa.parquet.ParquetFile(path) as file:
            count = file.metadata.num_rows
            cells = file.read(columns=sorted(set(wanted.values())))
        cells.validate(full=True)
    except (pa.ArrowException, OSError):
        raise _damaged(path) from None
    table = pa.table({role: cells[name] for role, name in wanted.items()})
    return Rows(str(path), table, range(1, count + 1), {})


def parquet_schema(path: Path) -> pa.Schema:
    """Return names and types of a Parquet file's columns."""
    _check_file(path, "parquet")
    try:
        return pa.parquet.read_schema(path)
    except (pa.ArrowException, OSError):
        raise _damaged(path) from None


def is_image(type_: pa.DataType) -> bool:
    """Tell whether a column of this type can hold encoded images: bytes, or a struct of them."""
    if types.is_struct(type_):
        at = type_.get_field_index("bytes")
        return at >= 0 and is_image(type_[at].type)
    return any(f(type_) for f in (types.is_binary, types.is_large_binary, types.is_binary_view))


def glance(path: Path, format_: Format) -> tuple[Rows, list[str]]:
    """Return all columns but images under their own names, and the names of those of images."""
    match format_:
        case "csv":
            return read_csv(path, None), []
        case "jsonl":
            return _all_of_jsonl(path), []
        case _:
            schema = parquet_schema(path)
            pictures = [field.name for field in schema if is_image(field.type)]
            others = {name: name for name in schema.names if name not in pictures}
            return read_parquet(path, others), pictures


def _damaged(path: Path) -> InputError:
    return InputError(f"{path}: expected a Parquet file, got one that is damaged or cut short")


def image_folders(path: Path) -> dict[str, list[Path]]:
    """Return the files of each label folder, sorted by name; hidden ones are passed over.

    Raises:
        InputError: there is no file at all, a file lies outside the label folders or deeper
            within, or a symbolic link leads out of `path`.
    """
    folders: dict[str, list[Path]] = {}
    with _reading(path):
        for folder in _visible(path, path.resolve()):
            if not folder.is_dir():
                raise InputError(
                    f"{path}: expected label folders alone, LABEL/file, got the file "
                    f"{folder.name!r}"
                )
            folders[folder.name] = _visible(folder, path.resolve())
            for inner in folders[folder.name]:
                if inner.is_dir():
                    raise InputError(f"{path}: {_nested(folder.name, inner.name)}")
    if not any(file.suffix.lower() in IMAGE_SUFFIXES for f in folders.values() for file in f):
        raise InputError(f"{path}: expected {NOUNS['images']}, got no image")
    return folders


def _visible(folder: Path, root: Path) -> list[Path]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        if not entry.resolve().is_relative_to(root):
            raise InputError(f"{entry}: expected a file within {root}, got a link that leaves it")
    return entries


def _nested(folder: str, inner: str) -> str:
    found = f"expected LABEL/file, got the folder {inner!r} within {folder!r}"
    return f"{found}; name one split as the path" if folder.lower() in _SPLITS else found


def loose_images(path: Path) -> list[Path]:
    """Return one image, or all files within a folder, however deep and without labels."""
    if not path.is_dir():
        return [path]
    found: list[Path] = []
    folders = [path]
    with _reading(path):
        while folders:
            entries = _visible(folders.pop(0), path.resolve())
            folders += [entry for entry in entries if entry.is_dir() and not entry.is_symlink()]
            found += [entry for entry in entries if not entry.is_dir()]
    if not found:
        raise InputError(f"{path}: expected images, got an empty folder")
    return found


def read_images(path: Path, files: Sequence[Path]) -> Rows:
    """Read files within `path`: role `input`, their bytes, and `label`, their folder's name."""
    names = [str(file.relative_to(path)) for file in files]
    wrong = "expected a name that ends in " + ", ".join(sorted(IMAGE_SUFFIXES))
    bad = {i: wrong for i, f in enumerate(files) if f.suffix.lower() not in IMAGE_SUFFIXES}
    places = [i for i in range(len(files)) if i not in bad]
    table = pa.table(
        {
            "input": _encoded([_bytes(files[i]) for i in places]),
            "label": _text([files[i].parent.name for i in places]),
        }
    )
    return Rows(str(path), table, places, bad, names=names)


def read_digits() -> Rows:
    """Return scikit-learn's 1,797 handwritten digits as greyscale PNGs of 8 × 8 pixels.

    Its bundled file is read without importing the package, which takes close to a second.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("source digits: expected scikit-learn to be installed")
    path = Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    values = np.loadtxt(io.BytesIO(_contents(path, "csv")), delimiter=",")
    pixels = np.rint(values[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    inputs = _encoded([_png(image) for image in pixels])
    labels = _text([str(int(label)) for label in values[:, 64]])
    table = pa.table({"input": inputs, "label": labels})
    return Rows("source digits", table, range(1, len(values) + 1), {})


def _encoded(values: Sequence[bytes]) -> pa.LargeBinaryArray:
    """Return what `pa.array` does, which imports pandas: a fifth of a second and 30 MiB."""
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.large_binary(), len(values), buffers)


def _text(values: Sequence[str]) -> pa.LargeStringArray:
    return _encoded([value.encode() for value in values]).cast(pa.large_string())


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _wanted(
    path: Path, columns: Mapping[str, str] | None, present: Sequence[str]
) -> Mapping[str, str]:
    wanted = {name: name for name in present} if columns is None else columns
    for role, name in wanted.items():
        if present.count(name) != 1:
            found = ", ".join(repr(p) for p in present)
            raise InputError(
                f"{path}: expected one column {name!r} for the {role}, got the columns {found}"
            )
    return wanted


def _contents(path: Path, format_: Format) -> bytes:
    """Return a file's bytes, decompressed and known to be UTF-8 and not empty."""
    _check_file(path, format_)
    data = _bytes(path)
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error):
            raise InputError(
                f"{path}: expected {NOUNS[format_]}, got gzip that is damaged or cut short"
            ) from None
    try:
        if not data.decode("utf-8-sig").strip():
            raise InputError(f"{path}: expected {NOUNS[format_]}, got an empty file")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line}: expected text in UTF-8") from None
    return data


def _check_file(path: Path, format_: Format) -> None:
    """Raise unless `path` is a regular file: to read from a pipe would wait for ever."""
    with _reading(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: expected {NOUNS[format_]}, got a folder, pipe or device")
        path.open("rb").close()


def _bytes(path: Path) -> bytes:
    with _reading(path):
        return path.read_bytes()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    except RuntimeError:
        raise InputError(f"{path}: can't be read: its links form a loop") from None
