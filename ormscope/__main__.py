"""`ormscope console [PID | SOCKET]`: the command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ormscope.console_client import Connection, ConsoleError, address_of, offers

_NEEDS_TEXTUAL = 'the live view needs Textual: pip install "ormscope[console]"'


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit status, 0 where it could be done."""
    parser = argparse.ArgumentParser("ormscope", description="What holds up a SQLAlchemy pool.")
    commands = parser.add_subparsers(required=True, metavar="command")
    console = commands.add_parser(
        "console",
        help="a live view of a process that called ormscope.serve_console()",
        description="A live view of a process that called ormscope.serve_console(): its pools, who holds a "
        "connection, and who waits for one. Without a process: those of this user that offer it.",
    )
    console.add_argument("process", nargs="?", metavar="PID | SOCKET")
    target = parser.parse_args(arguments).process
    try:
        return _list() if target is None else _view(target)
    except ConsoleError as error:
        print(f"ormscope console: {error}", file=sys.stderr)
        return 1


def _list() -> int:
    found = offers()
    for offer in found:
        print(f"{offer.pid:>8}  {offer.program or offer.lack}  ({offer.address})")
    if not found:
        print("No process of this user offers a console; one does after ormscope.serve_console().")
    return 0


def _view(target: str) -> int:
    try:
        from ormscope.console_view import ConsoleApp
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("textual", "rich"):
            raise
        raise ConsoleError(_NEEDS_TEXTUAL) from error
    connection = Connection(address_of(target))
    connection.ask("state")  # or say why not, before the terminal is taken over
    if not sys.stdout.isatty():
        raise ConsoleError("the live view needs a terminal")
    app = ConsoleApp(connection)
    app.run()
    connection.close()
    return app.return_code or 0


if __name__ == "__main__":
    sys.exit(main())
