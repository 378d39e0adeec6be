"""The shop's products where PostgreSQL is not: in an SQLite file, and in a MySQL server."""

from __future__ import annotations

import atexit
import csv
import gzip
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from workshop.keeper import Keeper
from workshop.mariadb import mysql_url
from workshop.shop import DATA
from workshop.stacks.drivers import mysql_arguments
from workshop.stacks.pool import BATCH

_COLUMNS = (
    "sku INTEGER PRIMARY KEY, title TEXT, department TEXT, category TEXT, brand TEXT,"
    " manufacturer_id INTEGER, package_size TEXT, unit_price DECIMAL(10, 2)"
)
# Every fifth product is copied, 18,546 of 92,331, for to load them all takes long. A stream is as long everywhere.
_NTH = 5


def _products() -> Iterator[list[str | None]]:
    with gzip.open(DATA / "products.csv.gz", "rt", encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines)
        next(rows)
        for row in rows:
            if not int(row[0]) % _NTH:
                yield [value or None for value in row]


def sqlite_shop() -> str:
    """The path of this process's SQLite file with the shop's products; it goes with the process, however that ends."""
    global _kept
    with _making:
        if _kept is None:
            keeper = Keeper(_KEEPER, cwd=Path(tempfile.gettempdir()), stdout=subprocess.PIPE)
            atexit.register(keeper.stop)
            assert keeper.process.stdout is not None
            path = keeper.process.stdout.readline().decode().strip()
            _fill(path)
            _kept = path
    return _kept


def _fill(path: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(f"CREATE TABLE products ({_COLUMNS})")
        connection.execute(
            "CREATE TABLE orders (id INTEGER PRIMARY KEY, household_id INTEGER, status TEXT)"
        )
        connection.executemany("INSERT INTO products VALUES (?, ?, ?, ?, ?, ?, ?, ?)", _products())
    connection.close()


_kept: str | None = None
_making = threading.Lock()

# Keeps a folder as long as its standard input is open, which ends with the parent in any case.
_KEEPER = """
import os, sys, tempfile
with tempfile.TemporaryDirectory(prefix="workshop-sqlite-", dir=".", ignore_cleanup_errors=True) as folder:
    print(os.path.join(os.path.abspath(folder), "shop.db"), flush=True)
    sys.stdin.read()
"""


def mysql_shop() -> str | None:
    """The address of this process's MySQL server, with the shop's products; None where there is none."""
    import pymysql

    url = mysql_url()
    if url is None:
        return None
    arguments = mysql_arguments(url)
    connection = pymysql.connect(database=arguments.pop("db"), **arguments)
    with connection, connection.cursor() as cursor:
        if not cursor.execute("SHOW TABLES LIKE 'products'"):
            cursor.execute(f"CREATE TABLE products ({_COLUMNS})")
            rows = [tuple(row) for row in _products()]
            for first in range(0, len(rows), BATCH):
                cursor.executemany(
                    "INSERT INTO products VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
                    rows[first : first + BATCH],
                )
        connection.commit()
    return url
