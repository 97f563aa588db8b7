"""Local files become records: every format, and one clear sentence for all that can go wrong."""

import csv
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from veilgraft.errors import InputError
from veilgraft.model import images
from veilgraft.study import DataSource, Task
from veilgraft_client import dataset
from veilgraft_client.dataset import Records

HAM = Task(labels=("ham", "spam"))
TOPICS = Task(type="multilabel", labels=("a", "b", "c"))
DIGITS = Task(labels=tuple("0123456789"))

DATA = Path(
    os.environ.get("VEILGRAFT_DATA") or Path(__file__).parents[2].parent / "shared" / "data"
)
with_shared_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the benchmark data are not here; VEILGRAFT_DATA may name them"
)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet(path: Path, **columns: Any) -> Path:
    pa.parquet.write_table(pa.table(columns), path)
    return path


def png(mode: str = "L", size: tuple[int, int] = (4, 3), color: Any = 0) -> bytes:
    return encoded(Image.new(mode, size, color), "PNG")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(
    path: Path,
    task: Task = HAM,
    modality: Literal["text", "image"] = "text",
    unit: str | None = None,
    partition: str | None = None,
    told: list[str] | None = None,
    **keys: Any,
) -> Records:
    tell = (list[str]() if told is None else told).append
    source = DataSource(path=path, **keys)
    return dataset.read(source, task, modality=modality, unit=unit, partition=partition, tell=tell)


def column(records: Records, name: str = "input") -> list[Any]:
    values: list[Any] = records.table[name].to_pylist()
    return values


def refusal(path: Path, task: Task = HAM, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(path, task, **options)
    (sentence,) = caught.value.problems
    assert "\n" not in sentence
    return sentence


# Text


def test_a_csv_file_becomes_texts_and_label_indices(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'id,text,label\n1,"hello, you",ham\n2,"two\nlines", spam \n')
    records = read(path)
    assert column(records) == ["hello, you", "two\nlines"]
    assert records.targets.tolist() == [0, 1]
    assert records.targets.dtype == np.int64
    assert records.table.schema.names == ["input", "label"]
    assert (len(records), records.bad) == (2, 0)


def test_csv_cells_stay_the_text_that_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label,zip\n1e3,ham,01234\nNA,spam,0\nnull,ham,1.0\n")
    records = read(path, unit="zip", partition="text")
    assert column(records) == ["1e3", "NA", "null"]
    assert column(records, "unit") == ["01234", "0", "1.0"]
    assert column(records, "partition") == ["1e3", "NA", "null"]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbftext,label\na,ham\n",
        b"text,label\r\na,ham\r\n",
        b"\n\ntext,label\n\na,ham",
        gzip.compress(b"text,label\na,ham\n"),
    ],
    ids=["byte order mark", "carriage returns", "blank lines", "gzip"],
)
def test_the_dressing_of_a_csv_file_makes_no_difference(tmp_path: Path, content: bytes) -> None:
    records = read(write(tmp_path / "a.csv", content))
    assert column(records) == ["a"]
    assert records.targets.tolist() == [0]


def test_a_text_of_several_megabytes_is_one_record(tmp_path: Path) -> None:
    text = "a,\n" * 1_000_000
    records = read(write(tmp_path / "a.csv", f'text,label\n"{text}",ham\nb,spam\n'))
    assert column(records) == [text, "b"]


@given(
    rows=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
            st.sampled_from(HAM.labels),
        ),
        min_size=1,
        max_size=8,
    ),
    quoted=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_what_a_csv_writer_wrote_is_read_unchanged(
    rows: list[tuple[str, str]], quoted: bool
) -> None:
    # The writer leaves a lone carriage return bare where lines end in a newline alone.
    style: Any = {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"} if quoted else {}
    rows = [(f"[{text}]", label) for text, label in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, **style).writerows([("text", "label"), *rows])
        records = read(path)
    assert column(records) == [text for text, _ in rows]
    assert records.targets.tolist() == [HAM.labels.index(label) for _, label in rows]


def test_a_bare_carriage_return_ends_a_row_and_is_not_silent(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\na\rb,ham\nc,spam\n")
    assert "row 2: expected 2 cells, got 1" in refusal(path)


def test_jsonl_holds_one_object_a_line(tmp_path: Path) -> None:
    lines = [{"text": "a\u2028b", "label": "spam", "who": 7}, {"who": "é", "label": 0, "text": "c"}]
    content = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    records = read(write(tmp_path / "a.jsonl", content), unit="who")
    assert column(records) == ["a\u2028b", "c"]
    assert records.targets.tolist() == [1, 0]
    assert column(records, "unit") == ["7", "é"]


def test_parquet_reads_text_however_it_is_stored(tmp_path: Path) -> None:
    texts, labels = pa.array(["x", "y"]), pa.array([1, 0], pa.int8())
    kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    for kind in [*kinds, pa.string_view()]:
        stored = texts.dictionary_encode() if kind == kinds[2] else texts.cast(kind)
        records = read(parquet(tmp_path / "a.parquet", text=stored, label=labels))
        assert column(records) == ["x", "y"]
        assert records.table.schema.types == [pa.large_string(), pa.int64()]
        assert records.targets.tolist() == [1, 0]


def test_parquet_columns_that_nobody_named_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    secret = pa.array(["s" * 1000 + str(i) for i in range(100)])
    pa.parquet.write_table(
        pa.table({"secret": secret, "text": ["t"] * 100, "label": [0] * 100}), path
    )
    chunk = pa.parquet.ParquetFile(path).metadata.row_group(0).column(0)
    whole = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    whole[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(whole)
    assert len(read(path)) == 100
    assert "damaged" in refusal(path, input="secret")


def test_a_format_that_is_given_wins_over_the_suffix(tmp_path: Path) -> None:
    path = write(tmp_path / "records.txt", "text,label\na,ham\n")
    assert len(read(path, format="csv")) == 1
    assert ".csv, .jsonl" in refusal(path)


# Labels


def test_labels_match_by_name_or_else_by_index(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\na,spam\nb,0\nc,1\n")
    assert read(path).targets.tolist() == [1, 0, 1]


def test_where_names_are_integers_only_names_match(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\na,1\nb,2\n")
    assert read(path, Task(labels=("1", "2"))).targets.tolist() == [0, 1]
    assert read(path, Task(labels=("2", "1"))).targets.tolist() == [1, 0]
    sentence = refusal(write(path, "text,label\na,1\nb,0\n"), Task(labels=("1", "2")))
    assert "row 3" in sentence
    assert "got '0'" in sentence


def test_names_match_however_unicode_composes_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\na," + unicodedata.normalize("NFD", "é") + "\n")
    assert read(path, Task(labels=("e", "é"))).targets.tolist() == [1]


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_an_unknown_label_always_fails(tmp_path: Path, policy: str) -> None:
    path = write(tmp_path / "a.csv", "text,label\na,ham\nb,eggs\n")
    sentence = refusal(path, on_bad_record=policy)
    assert sentence == f"{path}: row 3: expected one of the study's labels ham, spam, got 'eggs'"


def test_many_labels_come_from_text_or_from_a_list(tmp_path: Path) -> None:
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    cells = [["c", "a"], [], ["b", "b"]]
    lines = [json.dumps({"text": "t", "label": cell}) for cell in cells]
    paths = [
        write(tmp_path / "a.csv", "text,label\nt,c; a\nt,\nt,b;b;\n"),
        write(tmp_path / "a.jsonl", "\n".join(lines)),
        parquet(tmp_path / "a.parquet", text=["t"] * 3, label=cells),
        parquet(tmp_path / "b.parquet", text=["t"] * 3, label=[[2, 0], [], [1]]),
    ]
    for path in paths:
        records = read(path, TOPICS)
        assert records.targets.tolist() == expected
        assert records.targets.dtype == np.float32
        assert records.table.schema.types[1] == pa.list_(pa.float32(), 3)
        assert records.select(np.array([2, 0])).targets.tolist() == [[0, 1, 0], [1, 0, 1]]
    piped = write(tmp_path / "p.csv", "text,label\nt,c|a\n")
    assert read(piped, TOPICS, separator="|").targets.tolist() == [[1, 0, 1]]


def test_a_list_where_one_label_is_due_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=["t"], label=[["ham"]])
    assert "expected one label a row, got list" in refusal(path)


# Units


def test_one_person_has_one_name(tmp_path: Path) -> None:
    names = [" Zoé ", unicodedata.normalize("NFD", "Zoé"), "Zoé"]
    content = "text,label,who\n" + "".join(f"t,ham,{name}\n" for name in names)
    records = read(write(tmp_path / "a.csv", content), unit="who", partition="who")
    assert column(records, "unit") == ["Zoé"] * 3
    assert column(records, "partition") == ["Zoé"] * 3


def test_integers_name_a_unit_and_fractions_do_not(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=["t"], label=["ham"], i=[12], f=[12.0])
    assert column(read(path, unit="i"), "unit") == ["12"]
    assert "text or integers as unit, got double" in refusal(path, unit="f")
    path = write(tmp_path / "a.jsonl", '{"text": "t", "label": "ham", "who": 12.0}')
    assert "line 1: expected text, integers" in refusal(path, unit="who")


WHOLE = [("001", "1"), ("+1", "1"), (" 1 ", "1"), ("-0", "0"), ("-07", "-7"), ("9" * 1000,) * 2]


@pytest.mark.parametrize(("written", "name"), WHOLE)
def test_integers_are_one_id_however_they_are_written(
    tmp_path: Path, written: str, name: str
) -> None:
    path = write(tmp_path / "a.csv", f"text,label,who\nt,ham,{written}\n")
    assert column(read(path, unit="who", unit_type="integer"), "unit") == [name]
    as_text = read(path, unit="who", partition="who")
    assert column(as_text, "unit") == column(as_text, "partition") == [written.strip()]


def test_integers_compare_the_same_in_every_format(tmp_path: Path) -> None:
    ids = [7, -(2**63), 2**63 - 1]
    lines = [json.dumps({"text": "t", "label": "ham", "who": i}) for i in ids]
    paths = [
        parquet(tmp_path / "a.parquet", text=["t"] * 3, label=["ham"] * 3, who=ids),
        write(tmp_path / "a.jsonl", "\n".join(lines)),
        write(tmp_path / "a.csv", "text,label,who\n" + "".join(f"t,ham,{i}\n" for i in ids)),
    ]
    for path in paths:
        records = read(path, unit="who", unit_type="integer")
        assert column(records, "unit") == [str(i) for i in ids]


NOT_WHOLE = ["1.5", "1.0", "x", "1e3", "0x1", "1_000", "1 2", "--1", "+", "١", "１"]


@pytest.mark.parametrize("written", NOT_WHOLE)
def test_what_is_no_whole_number_is_a_bad_record_that_is_not_shown(
    tmp_path: Path, written: str
) -> None:
    path = write(tmp_path / "a.csv", f"text,label,who\nt,ham,3\nt,ham,{written}\n")
    told: list[str] = []
    records = read(path, unit="who", unit_type="integer", told=told, on_bad_record="skip")
    assert (column(records, "unit"), records.bad) == (["3"], 1)
    assert told == [f"{path}: row 3: expected a whole number as the unit; skipped"]
    expected = "row 3: expected a whole number as the unit; 1 of 2 records are bad"
    assert expected in refusal(path, unit="who", unit_type="integer")
    assert column(read(path, unit="who"), "unit")[1] == unicodedata.normalize("NFC", written)


def test_a_column_of_fractions_names_no_unit_even_if_all_are_whole(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=["t"], label=["ham"], who=[12.0])
    for kind in ("text", "integer"):
        for policy in ("fail", "skip"):
            sentence = refusal(path, unit="who", unit_type=kind, on_bad_record=policy)
            assert sentence == f"{path}: expected text or integers as unit, got double"


@pytest.mark.parametrize("kind", ["text", "integer"])
def test_an_empty_or_endless_id_is_a_bad_record(tmp_path: Path, kind: str) -> None:
    ids = ["1" * 1000, "", " \u00a0\u3000", "1" * 1001]
    content = "text,label,who\n" + "".join(f"t,ham,{name}\n" for name in ids)
    path, told = write(tmp_path / "a.csv", content), list[str]()
    options: dict[str, Any] = {"unit": "who", "unit_type": kind, "on_bad_record": "skip"}
    records = read(path, told=told, **options)
    assert column(records, "unit") == ids[:1]
    assert told == [
        f"{path}: row 3: the unit is empty; skipped",
        f"{path}: row 4: the unit is empty; skipped",
        f"{path}: row 5: expected at most 1,000 characters as the unit, got more; skipped",
    ]


def test_an_image_folder_has_no_unit_column(tmp_path: Path) -> None:
    write(tmp_path / "x/ham/1.png", png())
    sentence = refusal(tmp_path / "x", modality="image", unit="patient_id")
    assert "'patient_id'; images have none" in sentence


# Bad records


BAD_CSV = "text,label,who\n,ham,1\nok,spam,2\nshort\nt,,3\n  ,ham,4\nt,ham, \nt,ham,1,2\n"


def test_bad_rows_are_left_out_told_and_counted(tmp_path: Path) -> None:
    path, told = write(tmp_path / "a.csv", BAD_CSV), list[str]()
    records = read(path, unit="who", told=told, on_bad_record="skip")
    assert (column(records), column(records, "unit"), records.bad) == (["ok"], ["2"], 6)
    assert told == [
        f"{path}: row 2: the text is empty; skipped",
        f"{path}: row 4: expected 3 cells, got 1; skipped",
        f"{path}: row 5: the label is missing; skipped",
        f"{path}: row 6: the text is empty; skipped",
        f"{path}: row 7: the unit is empty; skipped",
        f"{path}: row 8: expected 3 cells, got 4; skipped",
    ]


def test_a_bad_row_stops_the_load_unless_told_otherwise(tmp_path: Path) -> None:
    told: list[str] = []
    sentence = refusal(write(tmp_path / "a.csv", BAD_CSV), unit="who", told=told)
    assert (
        "a.csv: row 2: the text is empty; 6 of 7 records are bad; on_bad_record: skip" in sentence
    )
    assert told == []


def test_a_broken_json_line_is_one_bad_row(tmp_path: Path) -> None:
    good = '{"text": "a", "label": "ham"}'
    lines = [good, '{"text": "b', "[1]", '{"label": "ham"}', "", '{"text": "\\ud800", "label": 0}']
    path, told = write(tmp_path / "a.jsonl", "\n".join([*lines, "[" * 100_000, good])), list[str]()
    records = read(path, told=told, on_bad_record="skip")
    assert (column(records), records.bad) == (["a", "a"], 5)
    assert [line.removeprefix(f"{path}: ").split(":")[0] for line in told] == [
        "line 2",
        "line 3",
        "line 4",
        "line 6",
        "line 7",
    ]


def test_missing_values_in_parquet_are_bad_records(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "a.parquet", text=["a", None, "c", "d"], label=["ham", "ham", None, "spam"]
    )
    records = read(path, on_bad_record="skip")
    assert (column(records), records.targets.tolist(), records.bad) == (["a", "d"], [0, 1], 2)
    assert "row 2" in refusal(path)
    topics = parquet(tmp_path / "b.parquet", text=["a"] * 3, label=[["a"], [None], None])
    assert read(topics, TOPICS, on_bad_record="skip").targets.tolist() == [[1, 0, 0]]


def test_twenty_bad_rows_are_told_and_the_rest_counted(tmp_path: Path) -> None:
    path, told = write(tmp_path / "a.csv", "text,label\na,ham\n" + ",ham\n" * 45), list[str]()
    assert read(path, told=told, on_bad_record="skip").bad == 45
    assert len(told) == 21
    assert told[-1] == f"{path}: 25 more bad records skipped"


@given(st.lists(st.sampled_from(["good", "ragged", "empty", "unlabelled"]), max_size=30))
@settings(max_examples=50, deadline=None)
def test_every_row_is_either_a_record_or_bad_and_no_message_holds_its_text(rows: list[str]) -> None:
    shapes = {
        "good": "PRIVATE{},ham",
        "ragged": "PRIVATE",
        "empty": ",ham",
        "unlabelled": "PRIVATE,",
    }
    lines = ["text,label", "PRIVATE,ham", *(shapes[r].format(i) for i, r in enumerate(rows))]
    told: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "a.csv"), "\n".join(lines))
        records = read(path, told=told, on_bad_record="skip")
    expected = [f"PRIVATE{i}" for i, row in enumerate(rows) if row == "good"]
    assert column(records) == ["PRIVATE", *expected]
    assert records.bad == len(rows) - len(expected)
    places = [i for i, row in enumerate(rows, start=3) if row != "good"]
    told_rows = [line.removeprefix(f"{path}: ").split(":")[0] for line in told[:20]]
    assert told_rows == [f"row {place}" for place in places[:20]]
    assert len(told) == min(len(places), 21)
    assert "PRIVATE" not in "".join(told)


# Files that can't be used


def gzip_cut_short() -> bytes:
    text = "".join(f"text {zlib.crc32(bytes([i]))},ham\n" for i in range(200))
    return gzip.compress(f"text,label\n{text}".encode())[:-20]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"", "expected a CSV file, got an empty file"),
        ("a.csv", b"\xef\xbb\xbf\n \n", "expected a CSV file, got an empty file"),
        ("a.csv", b"text,label\n", "expected at least one record, got none"),
        ("a.csv", b"text,label", "expected at least one record, got none"),
        ("a.csv", b"text,target\na,b\n", "column 'label' for the label, got the columns 'text', "),
        ("a.csv", b"text,label,text\na,ham,b\n", "one column 'text' for the input"),
        ("a.csv", b"text,label\na,ham\ncaf\xe9,ham\n", "line 3: expected text in UTF-8"),
        ("a.csv", "text,label\na,ham\n".encode("utf-16"), "line 1: expected text in UTF-8"),
        ("a.csv", b'text,label\na,ham\n"b,ham\nc,ham\n', "row 3: a quoted cell is never closed"),
        ("a.csv", b'label,text\nham,a\nham,"b\nham,c\n', "row 3: a quoted cell is never closed"),
        ("a.csv", b'"' + b"x" * 200_000, "expected a CSV file with a header row"),
        ("a.csv.gz", gzip_cut_short(), "expected a CSV file, got gzip that is damaged or cut"),
        ("a.jsonl", b"", "expected a JSONL file, got an empty file"),
        ("a.jsonl", b"text,label\na,b\n", "expected one JSON object a line, got none"),
        ("a.jsonl", b'{"text": "a"}', "column 'label' for the label, got the columns 'text'"),
        ("a.parquet", b"", "expected a Parquet file, got one that is damaged or cut short"),
        ("a.parquet", b"text,label\na,ham\n", "expected a Parquet file"),
        ("a.xlsx", b"PK", "expected a folder of images or a file named .csv, .jsonl, .ndjson"),
        ("a", b"", "expected a folder of images or a file named .csv"),
    ],
)
def test_a_file_that_is_none_of_its_format_is_named(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    path = write(tmp_path / name, content)
    sentence = refusal(path)
    assert sentence.startswith(f"{path}: ")
    assert expected in sentence


def test_parquet_cut_short_anywhere_is_one_sentence(tmp_path: Path) -> None:
    whole = parquet(tmp_path / "w.parquet", text=["a", "b"], label=["ham", "spam"]).read_bytes()
    for length in range(0, len(whole), 7):
        assert "damaged or cut short" in refusal(write(tmp_path / "a.parquet", whole[:length]))


def test_text_in_parquet_that_is_no_unicode_is_damage(tmp_path: Path) -> None:
    text = pa.array([b"\xff\xfe"]).view(pa.string())
    path = parquet(tmp_path / "a.parquet", text=text, label=["ham"])
    assert "damaged" in refusal(path)


def test_only_bad_rows_are_no_records(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\n,ham\n,ham\nx\n")
    assert "expected at least one record, got 3 bad records alone" in refusal(
        path, on_bad_record="skip"
    )
    empty = parquet(tmp_path / "a.parquet", text=pa.array([], pa.string()), label=pa.array([]))
    assert "at least one record, got none" in refusal(empty)


def test_what_is_no_readable_file_is_named(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.csv")
    loop = tmp_path / "loop.csv"
    loop.symlink_to(loop)
    assert "can't be read" in refusal(loop)
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    assert "expected a CSV file, got a folder, pipe or device" in refusal(pipe)
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    assert "expected a CSV file, got a folder" in refusal(folder, format="csv")
    assert "got a folder of images" in refusal(folder)
    assert "expected a folder of images (LABEL/file), got a file" in refusal(
        write(tmp_path / "a.csv", "text,label\na,ham\n"), format="images", modality="image"
    )


@contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """Give up the superuser's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_file_without_permission_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        table = write(folder / "a.csv", "text,label\na,ham\n")
        table.chmod(0)
        write(folder / "x/ham/1.png", png()).parent.chmod(0)
        with as_an_ordinary_user():
            assert "can't be read: Permission denied" in refusal(table)
            assert "can't be read: Permission denied" in refusal(folder / "x", modality="image")
        (folder / "x/ham").chmod(0o700)


def test_the_format_must_suit_the_modality(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "image,label\na,ham\n")
    assert "for images expected a Parquet file or a folder" in refusal(path, modality="image")
    numbers = parquet(tmp_path / "a.parquet", text=[1], image=["x"], label=["ham"])
    assert "expected text as input, got int64" in refusal(numbers)
    assert "expected encoded images as input, got string" in refusal(numbers, modality="image")


# Images


def folder_of(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        write(root / name, png(color=i))
    return root


def test_an_image_folder_is_read_in_one_order(tmp_path: Path) -> None:
    names = ["spam/b.PNG", "spam/a.png", "ham/z.jpeg", "ham/.hidden", ".cache/x.png"]
    root = folder_of(tmp_path / "x", *names)
    records = read(root, modality="image")
    assert column(records) == [(root / name).read_bytes() for name in (names[2], *names[1::-1])]
    assert records.targets.tolist() == [0, 1, 1]
    assert records.table.schema.types[0] == pa.large_binary()


def test_folders_may_be_named_by_index(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "x", "1/a.png", "0/b.png")
    assert read(root, modality="image").targets.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["eggs/a.png", "ham/a.png"], "labels ham, spam, got 'eggs'"),
        (["ham/a.png", "stray.png"], "label folders alone, LABEL/file, got the file 'stray.png'"),
        (["ham/deep/a.png"], "got the folder 'deep' within 'ham'"),
        (["train/ham/a.png"], "the folder 'ham' within 'train'; name one split as the path"),
        (["ham/.hidden"], "expected a folder of images (LABEL/file), got no image"),
        (["ham/notes.txt"], "got no image"),
    ],
)
def test_an_image_folder_of_another_shape_is_refused(
    tmp_path: Path, names: list[str], expected: str
) -> None:
    assert expected in refusal(folder_of(tmp_path / "x", *names), modality="image")


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside/a.png", png())
    for link, target in (("ham/b.png", outside), ("spam", outside.parent)):
        root = folder_of(tmp_path / link.replace("/", "-"), "ham/a.png")
        (root / link).symlink_to(target)
        assert "got a link that leaves it" in refusal(root, modality="image")
    within = folder_of(tmp_path / "within", "ham/a.png")
    (within / "ham/b.png").symlink_to(within / "ham/a.png")
    assert len(read(within, modality="image")) == 2
    (within / "ham/c.png").symlink_to(within / "ham/c.png")
    assert "can't be read" in refusal(within, modality="image")


def test_damaged_images_are_bad_records(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "x", "ham/a.png", "ham/b.dcm", "spam/d.png")
    noise = np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8)
    write(root / "ham/c.png", encoded(Image.fromarray(noise), "PNG")[:-500])
    told: list[str] = []
    records = read(root, modality="image", told=told, on_bad_record="skip")
    assert (len(records), records.bad, records.targets.tolist()) == (2, 2, [0, 1])
    assert told[0].startswith(f"{root}: ham/b.dcm: expected a name that ends in .bmp")
    assert told[1].startswith(f"{root}: ham/c.png: expected a whole image")
    assert "ham/b.dcm" in refusal(root, modality="image")


def test_parquet_images_are_bytes_or_the_hub_s_struct(tmp_path: Path) -> None:
    one, two = png(color=1), png(color=2)
    plain = parquet(tmp_path / "a.parquet", image=[one, two], label=["ham", "spam"])
    structs = [{"bytes": one, "path": None}, {"bytes": two, "path": "b.png"}]
    struct = parquet(tmp_path / "b.parquet", image=structs, label=["ham", "spam"])
    for path in (plain, struct):
        assert column(read(path, modality="image")) == [one, two]
    structs += [{"bytes": None, "path": "elsewhere.png"}, {"bytes": b"junk", "path": None}]
    broken = parquet(tmp_path / "c.parquet", image=structs, label=["ham", "spam", "ham", "ham"])
    told: list[str] = []
    records = read(broken, modality="image", told=told, on_bad_record="skip")
    assert column(records) == [one, two]
    assert told[0] == f"{broken}: row 3: the image is missing; skipped"
    assert told[1].startswith(f"{broken}: row 4: expected a whole image")


def test_a_decompression_bomb_is_a_bad_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder_of(tmp_path / "x", "ham/a.png")
    write(root / "ham/b.png", png(size=(40, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read(root, modality="image", on_bad_record="skip").bad == 1
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pil_s_limit_is_a_limit_and_not_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert images.decode(png(size=(10, 10))).size == (10, 10)
    with pytest.raises(InputError, match=r"at most 100 pixels, got 15 × 10"):
        images.decode(png(size=(15, 10)))


def test_greyscale_of_16_bits_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 256, 257], [32896, 65534, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        found = np.asarray(images.decode(encoded(Image.fromarray(values), kind)))
        assert found.shape == (2, 3, 3)
        assert found[:, :, 0].tolist() == [[0, 0, 1], [128, 254, 255]]
        assert (found == found[:, :, :1]).all()


@given(st.lists(st.integers(0, 255), min_size=4, max_size=4))
@settings(max_examples=25, deadline=None)
def test_8_bits_spread_over_16_decode_to_themselves(values: list[int]) -> None:
    wide = np.array([values], np.uint16) * 257
    found = np.asarray(images.decode(encoded(Image.fromarray(wide), "PNG")))
    assert found[0, :, 0].tolist() == values


def test_transparency_is_laid_on_white() -> None:
    half_red = encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 0)), "PNG")
    assert images.decode(half_red).getpixel((0, 0)) == (255, 255, 255)
    solid = encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 255)), "PNG")
    assert images.decode(solid).getpixel((0, 0)) == (255, 0, 0)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    assert images.decode(encoded(palette, "PNG")).getpixel((0, 0)) == (10, 20, 30)
    clear = encoded(palette, "PNG", transparency=0)
    assert images.decode(clear).getpixel((0, 0)) == (255, 255, 255)


def test_an_image_comes_out_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    image = images.decode(encoded(Image.new("RGB", (6, 2)), "JPEG", exif=exif))
    assert image.size == (2, 6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_every_common_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    image = images.decode(encoded(Image.new(mode, (5, 4)), kind))
    assert (image.mode, image.size) == ("RGB", (5, 4))


def test_what_has_no_known_range_or_decoder_is_refused() -> None:
    floats = encoded(Image.new("F", (2, 2), 0.5), "TIFF")
    deep = encoded(Image.new("I", (2, 2), 1 << 20), "TIFF")
    for data in (floats, deep):
        with pytest.raises(InputError, match="8 or 16 bits"):
            images.decode(data)
    # PIL itself decodes a bitmap of PPM; PostScript it hands to another program.
    others = [encoded(Image.new("RGB", (2, 2)), kind) for kind in ("PPM", "EPS")]
    for data in (*others, b"", b"GIF89a"):
        with pytest.raises(InputError, match="expected a whole image"):
            images.decode(data)


# Digits


def test_the_handwritten_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    expected = load_digits()
    records = dataset.read(DataSource(source="digits"), DIGITS, modality="image")
    assert records.targets.tolist() == expected.target.tolist()
    pixels = np.stack([np.asarray(images.decode(data))[:, :, 0] for data in column(records)])
    assert pixels.shape == (1797, 8, 8)
    np.testing.assert_array_equal(np.rint(pixels * (16 / 255)), expected.images)
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_digits_may_have_other_names_in_order() -> None:
    task = Task(labels=tuple(f"digit {i}" for i in range(10)))
    records = dataset.read(DataSource(source="digits"), task, modality="image")
    assert records.targets[:4].tolist() == [0, 1, 2, 3]


def test_digits_are_images_without_columns() -> None:
    source = DataSource(source="digits")
    with pytest.raises(InputError, match="holds images, and text was expected"):
        dataset.read(source, DIGITS, modality="text")
    with pytest.raises(InputError, match="'who'"):
        dataset.read(source, DIGITS, modality="image", unit="who")


# Records


def test_a_fingerprint_is_of_the_inputs_in_order(tmp_path: Path) -> None:
    records = read(write(tmp_path / "a.csv", "text,label\na,ham\nbé,spam\n"))
    framed = b"".join(len(t).to_bytes(8, "big") + t for t in (b"a", "bé".encode()))
    assert records.fingerprint == hashlib.sha256(framed).hexdigest()
    other = read(write(tmp_path / "b.csv", "text,label\na,spam\nbé,spam\n"))
    assert other.fingerprint == records.fingerprint
    assert records.select(np.array([1, 0])).fingerprint != records.fingerprint
    moved = read(write(tmp_path / "c.csv", "text,label\nab,spam\né,spam\n"))
    assert moved.fingerprint != records.fingerprint


def test_a_selection_keeps_order_and_every_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label,who\na,ham,x\n,ham,y\nc,spam,z\nd,ham,w\n")
    records = read(path, unit="who", on_bad_record="skip")
    chosen = records.select(np.array([2, 0, 2]))
    assert column(chosen) == ["d", "a", "d"]
    assert column(chosen, "unit") == ["w", "x", "w"]
    assert (chosen.targets.tolist(), chosen.bad, records.bad) == ([0, 0, 0], 0, 1)
    assert len(records.select(np.array([], np.int64))) == 0


def test_targets_may_be_written_to_as_torch_demands(tmp_path: Path) -> None:
    one = read(write(tmp_path / "a.csv", "text,label\na,ham\nb,spam\n"))
    many = read(write(tmp_path / "b.csv", "text,label\na,a;b\n"), TOPICS)
    assert one.targets.flags.writeable
    assert many.targets.flags.writeable


def test_the_data_set_for_partitioners_is_the_same_table(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\na,a;c\nb,b\nc,\n")
    found = read(path, TOPICS, partition="text").dataset()
    assert found.cache_files == []
    assert found["input"][:] == ["a", "b", "c"]
    assert found["label"][:] == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert found.select([2, 0])["partition"][:] == ["c", "a"]


def test_reading_files_that_need_no_pandas_does_not_import_it(tmp_path: Path) -> None:
    """It would take a fifth of a second and 30 MiB of every simulation."""
    write(tmp_path / "a.csv", "text,label\na,ham\nb,spam\n")
    parquet(tmp_path / "a.parquet", text=["a", "b"], label=["ham", "spam"])
    folder_of(tmp_path / "x", "ham/a.png", "spam/b.png")
    program = """
import sys
from pathlib import Path
from veilgraft.study import DataSource, Task
from veilgraft_client import dataset
task = Task(labels=("ham", "spam"))
for name in ("a.csv", "a.parquet", "x"):
    source = DataSource(path=Path(sys.argv[1], name))
    records = dataset.read(source, task, modality="image" if name == "x" else "text")
    assert records.targets.tolist() == [0, 1]
    assert "pandas" not in sys.modules, name
digits = Task(labels=tuple("0123456789"))
records = dataset.read(DataSource(source="digits"), digits, modality="image")
assert (len(records.inputs), len(records.targets), len(records.fingerprint)) == (1797, 1797, 64)
assert "pandas" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_reading_writes_no_file_anywhere(tmp_path: Path) -> None:
    """In a process of its own, since a library may look for its cache when it is imported."""
    data, home = tmp_path / "data", tmp_path / "home"
    write(data / "a.csv", "text,label\na,ham\n")
    write(data / "a.jsonl", '{"text": "a", "label": "ham"}')
    parquet(data / "a.parquet", text=["a"], label=["ham"])
    folder_of(data / "x", "ham/a.png")
    home.mkdir()
    program = """
import sys
from pathlib import Path
from veilgraft.study import DataSource, Task
from veilgraft_client import dataset
task = Task(labels=("ham", "spam"))
for name in ("a.csv", "a.jsonl", "a.parquet", "x"):
    path = Path(sys.argv[1], name)
    modality = "image" if name == "x" else "text"
    dataset.describe(path)
    records = dataset.read(DataSource(path=path), task, modality=modality)
    assert not {"datasets", "sklearn", "torch"} & set(sys.modules)
dataset.read(DataSource(source="digits"), Task(labels=tuple("0123456789")), modality="image")
assert "sklearn" not in sys.modules
records.dataset().select([0])
"""
    before = sorted(data.rglob("*"))
    environment = {"HOME": str(home), "TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(
        [sys.executable, "-c", program, str(data)], check=True, cwd=home, env=environment
    )
    assert list(home.rglob("*")) == []
    assert sorted(data.rglob("*")) == before


# Inputs without labels


def test_inputs_come_with_the_place_where_each_stands(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,note\na,x\nb,y\n")
    assert dataset.inputs(path, "text") == (["row 2", "row 3"], ["a", "b"])
    assert dataset.inputs(path, "text", "note")[1] == ["x", "y"]
    with pytest.raises(InputError, match=r"row 3: the text is empty; 1 of 2 records"):
        dataset.inputs(write(path, "text\na\n \n"), "text")


def test_inputs_may_be_one_image_or_a_folder_however_deep(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "x", "b.png", "deep/er/a.png")
    names, values = dataset.inputs(root, "image")
    assert names == ["b.png", "deep/er/a.png"]
    assert values == [(root / name).read_bytes() for name in names]
    assert dataset.inputs(root / "b.png", "image") == (["b.png"], [values[0]])
    for path, modality in ((root, "text"), (root / "absent.png", "image")):
        with pytest.raises(InputError):
            dataset.inputs(path, modality)  # type: ignore[arg-type]


# A look at a path


def test_a_look_at_a_table_finds_text_and_labels(tmp_path: Path) -> None:
    rows = "".join(f"{i},{'ab'[i % 2]},{i % 12},a longer text {i}\n" for i in range(40))
    path = write(tmp_path / "a.csv", "id,group,label,note\n" + rows + "ragged\n")
    seen = dataset.describe(path)
    assert (seen.format, seen.modality, seen.rows) == ("csv", "text", 41)
    assert seen.inputs == ("note", "id")
    assert seen.label_columns == ("label", "group")
    assert seen.labels == tuple(str(i) for i in range(12))


def test_a_look_at_json_lines_finds_lists_of_labels(tmp_path: Path) -> None:
    lines = [{"body": f"text {i}", "labels": ["b", "a"][: i % 3], "score": 0.5} for i in range(9)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    seen = dataset.describe(path)
    assert (seen.format, seen.inputs[0], seen.label_columns) == ("jsonl", "body", ("labels",))
    assert seen.labels == ("a", "b")


def test_a_look_at_images_decodes_none(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "x", "dog/a.png", "cat/b.png", "cat/c.png")
    seen = dataset.describe(root)
    assert (seen.format, seen.modality, seen.rows) == ("images", "image", 3)
    assert (seen.inputs, seen.labels) == (("image",), ("cat", "dog"))
    path = parquet(tmp_path / "a.parquet", scan=[b"junk"] * 6, kind=["b", "a"] * 3)
    seen = dataset.describe(path)
    assert (seen.modality, seen.inputs, seen.labels) == ("image", ("scan",), ("a", "b"))


def test_a_look_where_there_is_nothing_to_learn_from_says_so(tmp_path: Path) -> None:
    unlabelled = write(tmp_path / "a.csv", "text\n" + "".join(f"text {i}\n" for i in range(200)))
    assert dataset.describe(unlabelled).label_columns == ()
    assert dataset.describe(unlabelled).labels == ()
    numbers = parquet(tmp_path / "a.parquet", x=[0.5, 1.5], y=[1, 2])
    with pytest.raises(InputError, match="a column of texts or images, got none"):
        dataset.describe(numbers)


# Real data


@with_shared_data
def test_ag_news_is_read_whole() -> None:
    path = DATA / "text/ag_news/train.csv"
    seen = dataset.describe(path)
    assert seen.labels == ("Business", "Sci/Tech", "Sports", "World")
    records = read(path, Task(labels=seen.labels))
    assert (len(records), records.bad) == (5600, 0)
    assert set(records.targets.tolist()) == {0, 1, 2, 3}
    with path.open(encoding="utf-8", newline="") as file:
        expected = [row["text"] for row in csv.DictReader(file)]
    assert column(records) == expected


@with_shared_data
def test_sms_messages_are_read_whole() -> None:
    records = read(DATA / "text/sms_spam.csv")
    assert (len(records), records.bad) == (5171, 0)
    assert 0 < records.targets.mean() < 0.5


@with_shared_data
def test_fashion_mnist_decodes() -> None:
    task = Task(labels=tuple(f"kind {i}" for i in range(10)))
    records = read(DATA / "image/fashion_mnist/test.parquet", task, modality="image")
    assert (len(records), records.bad) == (2000, 0)
    assert images.decode(column(records)[0]).size == (28, 28)
    assert set(records.targets.tolist()) == set(range(10))
