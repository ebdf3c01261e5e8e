"""A database that is broken is put aside, one that is only busy is not."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from vecmill.storage.sqlite import connect, open_database

SCHEMA = "CREATE TABLE things (id INTEGER PRIMARY KEY, name TEXT)"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "things.db"


def filled(path: Path, things: int = 1) -> None:
    connection = open_database(path, SCHEMA, 1)
    connection.executemany("INSERT INTO things (name) VALUES (?)", [("thing" * 100,)] * things)
    connection.close()


def count(connection: sqlite3.Connection) -> int:
    [rows] = connection.execute("SELECT count(*) FROM things").fetchone()
    connection.close()
    return int(rows)


def test_what_is_committed_is_there_again(path: Path) -> None:
    filled(path)
    assert count(open_database(path, SCHEMA, 1)) == 1
    assert [file.name for file in path.parent.iterdir()] == ["things.db"]


@pytest.mark.parametrize("damage", ["no database at all", "header"])
def test_a_broken_file_is_put_aside(path: Path, damage: str) -> None:
    filled(path)
    content = path.read_bytes()
    path.write_bytes(b"not a database, but long enough to be one" * 100 if damage != "header" else b"\1" + content[1:])
    assert count(open_database(path, SCHEMA, 1)) == 0
    assert [file.name for file in path.parent.glob("*.aside-*")] != []


def test_another_version_is_put_aside(path: Path) -> None:
    filled(path)
    assert count(open_database(path, SCHEMA, 2)) == 0
    assert [file.name for file in path.parent.glob("*.aside-*")] != []


def test_a_locked_database_is_left_where_it_is(path: Path) -> None:
    filled(path)
    holder = connect(path)
    holder.execute("BEGIN EXCLUSIVE")
    other = connect(path, busy_seconds=0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("INSERT INTO things (name) VALUES ('x')")
    other.close()
    holder.close()
    assert count(open_database(path, SCHEMA, 1)) == 1
