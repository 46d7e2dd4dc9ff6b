"""Rows of named columns: in files (.jsonl, .json, .parquet, .txt), in a `datasets.Dataset`, in a folder saved by it.

Each row comes with its place, "pairs.jsonl, line 3", for messages. Columns that hold nothing (null) are absent.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...envs.comparisons import replace_file

Source = str | os.PathLike[str] | Any
Row = dict[str, Any]


def source_name(source: Source) -> str:
    return str(os.fspath(source)) if isinstance(source, str | os.PathLike) else "the dataset"


def short(value: Any) -> str:
    """For messages."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def listed(row: Iterable[str]) -> str:
    return ", ".join(row) or "no columns"


def read_rows(source: Source) -> Iterator[tuple[str, Row]]:
    """(place, row) of each row; ValueError where there is none."""
    empty = True
    for where, row in _rows(source):
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: {short(row)} is no object of columns such as {{'prompt': ...}}")
        empty = False
        yield where, {name: _without_nothing(value) for name, value in row.items() if value is not None}
    if empty:
        raise ValueError(f"{source_name(source)} is empty: it holds no rows")


def _without_nothing(value: Any) -> Any:
    """Messages without the fields that a table had to add to make all of them alike."""
    if not isinstance(value, list):
        return value
    return [
        {k: v for k, v in entry.items() if v is not None} if isinstance(entry, Mapping) else entry
        for entry in value
    ]


def _rows(source: Source) -> Iterator[tuple[str, Any]]:
    if not isinstance(source, str | os.PathLike):
        return _of_dataset(source, "the dataset")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    if path.is_dir():
        return _of_folder(path)
    if path.suffix not in READERS:
        raise ValueError(
            f"{path}: files are read by their endings, {', '.join(READERS)}; rename it, or make it one of these"
        )
    return READERS[path.suffix](path)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: it is no UTF-8 ({error.reason}); save it as UTF-8") from error


def _parsed(text: str, where: str) -> Any:
    def constant(name: str) -> Any:
        raise ValueError(f"{where}: {name} is no number that JSON knows: remove the row, or correct it")

    return json.loads(text, parse_constant=constant)


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    lines = _text(path).split("\n")  # not splitlines: JSON may hold other line breaks within its texts
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = _parsed(line, where)
        except json.JSONDecodeError as error:
            if number == len(lines):  # the last one, without a line break after it
                raise ValueError(
                    f"{where}: the last line is cut off after {len(line)} characters; whoever wrote the file was "
                    "stopped: remove this line, or write the file again"
                ) from error
            raise ValueError(f"{where}, character {error.colno}: this is no JSON ({error.msg})") from error
        yield where, row


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        data = _parsed(_text(path), str(path))
    except json.JSONDecodeError as error:
        hint = "; a file of one object a line is called .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(
            f"{path}, line {error.lineno}, character {error.colno}: this is no JSON ({error.msg}){hint}"
        ) from error
    if not isinstance(data, list):
        raise ValueError(f"{path} holds {short(data)}; a .json file of rows is one list of objects")
    for number, row in enumerate(data):
        yield f"{path}, row {number}", row


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    pyarrow, parquet = _pyarrow(path)
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is damaged, or no parquet file: {error}") from error
    for number, row in enumerate(table.to_pylist()):
        yield f"{path}, row {number}", row


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path}: parquet files need pyarrow: pip install preflab[llm]") from error
    return pyarrow, parquet


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", {"prompt": line.rstrip("\r")}


READERS: Mapping[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _lines,
}


def _of_folder(path: Path) -> Iterator[tuple[str, Any]]:
    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        raise ValueError(
            f"{path} is no folder that a datasets.Dataset was saved to (it has no dataset_info.json); the rounds of a "
            "run are read by exports.read_rounds"
        )
    from datasets import load_from_disk

    return _of_dataset(load_from_disk(str(path)), str(path))


def _of_dataset(dataset: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"{name} has the splits {listed(dataset)}: give one of them, such as dataset['train']"
        )
    if not isinstance(dataset, Iterable):
        raise ValueError(f"{short(dataset)} is neither a file nor a dataset")
    for number, row in enumerate(dataset):
        yield f"{name}, row {number}", row


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as .jsonl, .json (one list) or .parquet, by the name's ending; the file appears whole, by rename."""
    target = Path(path)
    if target.suffix == ".jsonl":
        data = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
    elif target.suffix == ".json":
        data = json.dumps(list(rows), ensure_ascii=False, allow_nan=False, indent=1).encode()
    elif target.suffix == ".parquet":
        pyarrow, parquet = _pyarrow(target)
        names = dict.fromkeys(name for row in rows for name in row)  # pyarrow looks at the first row alone
        columns = {name: [row.get(name) for row in rows] for name in names}
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.table(columns), buffer)
        data = buffer.getvalue()
    else:
        raise ValueError(f"{target}: rows are written as .jsonl, .json or .parquet")
    replace_file(target, lambda file: file.write(data))
