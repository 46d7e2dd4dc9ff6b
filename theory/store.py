"""The store of finished cells: one SQLite file, one transaction a cell.

A rollback journal (not WAL, which needs memory shared between processes and so fails on network folders) with full
synchronisation: a process or a machine stopped at any moment leaves the cells that it finished, and nothing
half-written. A transaction takes some 10 ms, so a cell had better take longer. Any number of processes may write to
one store; a cell that two of them finished is kept once, the first.

What can be wrong with a file is told apart:
- unreadable, failing SQLite's integrity check, missing a table, or holding a row whose digest is wrong:
`DamagedStore`.
  The file is set aside under another name and the error says which; nothing is rebuilt in its place until
  the user starts again.
- written by a newer preflab, or by something else: `StoreError`; the file is left as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .cells import Cell, canonical, decode

SCHEMA = 1
APPLICATION = 0x70726662  # "prfb", in the file's header
FILE = "store.sqlite"
BUSY_SECONDS = 60.0  # how long to wait for another process's transaction

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE cells (
    key TEXT PRIMARY KEY,
    function TEXT NOT NULL,
    parameters TEXT NOT NULL,
    seed INTEGER NOT NULL,
    result TEXT NOT NULL,
    digest TEXT NOT NULL,
    seconds REAL NOT NULL,
    finished TEXT NOT NULL
);
"""


class StoreError(Exception):
    """The store cannot be used; the message says why and what to do."""


class DamagedStore(StoreError):
    """The store was damaged and has been set aside as `aside`."""

    def __init__(self, message: str, aside: Path) -> None:
        super().__init__(message)
        self.aside = aside


class _Damage(Exception):
    """Internal: what is wrong with the file."""


@dataclass(frozen=True)
class Finished:
    """A finished cell's result and the seconds that it took."""

    result: Mapping[str, Any]
    seconds: float


def _digest(key: str, result: str) -> str:
    return hashlib.sha256(f"{key}\0{result}".encode()).hexdigest()


def check_writable(folder: Path) -> None:
    """Create `folder` if need be and prove that files can be written in it, before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-"):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise StoreError(f"cannot write to {folder}: {reason}. Choose another folder with --out.") from None


class Store:
    """The finished cells in `folder`/store.sqlite. Open it with `Store.open(folder)`; it is a context
    manager."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, create: bool = True) -> Self:
        """The store of a folder, checked in full; made when absent (or an error, with create=False)."""
        folder = Path(folder)
        path = folder / FILE
        if create:
            check_writable(folder)
            if not path.exists():
                _create(path)
        elif not path.is_file():
            raise StoreError(
                f"{folder} holds no results (no {FILE}); make some with: preflab verify --out {folder}"
            )
        connection = _connect(path)
        try:
            with _explained(path):
                _check(connection, path)
        except _Damage as damage:
            connection.close()
            aside = _set_aside(path)
            raise DamagedStore(
                f"{path} is damaged ({damage}). It has been set aside as {aside.name} in the same folder and "
                "nothing was rebuilt in its place. Run the same command again to start afresh; what is still "
                f"readable can be recovered with: sqlite3 {aside} .recover",
                aside,
            ) from None
        except BaseException:
            connection.close()
            raise
        return cls(path, connection)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _use(self) -> Iterator[None]:
        try:
            with _explained(self.path):
                yield
        except _Damage as damage:  # it was sound when it was opened
            raise StoreError(
                f"{self.path} broke while in use ({damage}); run the same command again to have it checked"
            ) from None

    # ---- cells ------------------------------------------------------------------------------------------

    def __contains__(self, cell: Cell) -> bool:
        with self._use():
            row = self._connection.execute("SELECT 1 FROM cells WHERE key = ?", (cell.key,)).fetchone()
        return row is not None

    def __len__(self) -> int:
        with self._use():
            return int(self._connection.execute("SELECT count(*) FROM cells").fetchone()[0])

    def get(self, cell: Cell) -> Finished | None:
        """The cell's result, or None while it is not finished."""
        with self._use():
            row = self._connection.execute(
                "SELECT result, seconds FROM cells WHERE key = ?", (cell.key,)
            ).fetchone()
        return None if row is None else Finished(decode(json.loads(row[0])), row[1])

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells that are not finished, in order and each once."""
        return [cell for cell in dict.fromkeys(cells) if cell not in self]

    def put(self, cell: Cell, result: Mapping[str, Any], seconds: float) -> bool:
        """Keep a finished cell, in one transaction. False when another process had finished it before."""
        text = canonical(result, f"result of {cell.function}")
        row = (
            cell.key,
            cell.function,
            canonical(cell.parameters),
            cell.seed,
            text,
            _digest(cell.key, text),
            float(seconds),
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        with self._use(), self._connection:
            cursor = self._connection.execute("INSERT OR IGNORE INTO cells VALUES (?,?,?,?,?,?,?,?)", row)
        return cursor.rowcount == 1

    def table(self) -> list[tuple[str, str, str, int, str]]:
        """What the cells hold, without when and how fast: (key, function, parameters, seed, result)."""
        query = "SELECT key, function, parameters, seed, result FROM cells ORDER BY key"
        with self._use():
            return self._connection.execute(query).fetchall()

    # ---- notes ------------------------------------------------------------------------------------------

    def note(self, name: str, value: Any) -> None:
        """Keep a JSON-able value under a name, replacing what stood there."""
        with self._use(), self._connection:
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, canonical(value)))

    def noted(self, name: str) -> Any:
        """The value under a name, or None."""
        with self._use():
            row = self._connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else decode(json.loads(row[0]))


def _connect(path: Path) -> sqlite3.Connection:
    try:
        return sqlite3.connect(path, timeout=BUSY_SECONDS)
    except sqlite3.Error as error:
        raise StoreError(f"cannot open {path}: {error}") from None


def _create(path: Path) -> None:
    """Make an empty store under a temporary name and give it its own, unless another process was faster."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        connection = _connect(temporary)
        with connection:
            connection.executescript(
                f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA};"
                f"BEGIN; {_TABLES} COMMIT;"
            )
        connection.close()
        try:
            os.link(temporary, path)  # unlike a rename, this cannot replace a store that appeared meanwhile
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not path.exists():
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Raise _Damage for a damaged file, StoreError for a sound file that is not this program's to use."""
    if path.stat().st_size == 0:
        raise _Damage("the file is empty")
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    problems = [row[0] for row in connection.execute("PRAGMA integrity_check(1)")]
    if problems != ["ok"]:
        raise _Damage(problems[0].replace("\n", " "))
    if application != APPLICATION:
        raise StoreError(f"{path} is an SQLite file, but not preflab's; choose another folder with --out")
    if version > SCHEMA:
        raise StoreError(
            f"{path} was written by a newer preflab (its format is {version}, this one reads {SCHEMA}). "
            "It is left as it is: upgrade preflab, or choose another folder with --out."
        )
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if missing := {"meta", "cells"} - tables:
        raise _Damage(f"it has no table {' and '.join(sorted(missing))}")
    rows = connection.execute("SELECT key, function, result, digest FROM cells")
    for key, function, result, digest in rows:
        if _digest(key, result) != digest:
            raise _Damage(f"the result of cell {key[:12]} ({function}) does not match its digest")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into _Damage (the file is broken) or StoreError (it cannot be used now)."""
    try:
        yield
    except sqlite3.OperationalError as error:  # locked, full disk, read-only, no such column
        if "no such" in str(error):
            raise _Damage(str(error)) from None
        raise StoreError(f"{path}: {error}") from None
    except (sqlite3.DatabaseError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise _Damage(str(error)) from None


def _set_aside(path: Path) -> Path:
    """Rename a damaged store, and the journal beside it, to a name with the time. Returns the new path."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    names = (f"store.damaged-{stamp}{suffix}.sqlite" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    os.replace(path, aside)
    journal = path.with_name(path.name + "-journal")
    if journal.exists():
        os.replace(journal, aside.with_name(aside.name + "-journal"))
    return aside
