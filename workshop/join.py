"""`python3 lab.py join ADDRESS NAME`: share with the instructor's room which tasks you have done, until Ctrl-C.

ADDRESS is what `python3 lab.py room` shows, or a folder that the room looks into. What is shared is the name, and for
each task whether it is done, tried or open; no code, and nothing that a check has said.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from workshop import progress
from workshop.mistake import Mistake

_PAUSE = 2.0  # seconds between two looks at the learner's own progress
_PATIENCE = 5.0  # seconds for the room to answer


def share(address: str, name: str) -> None:
    """Share once. Raises Mistake where the room refuses, OSError or httpx.TransportError where it cannot be reached."""
    if not address.startswith(("http://", "https://")):
        if not Path(address).is_dir():
            raise Mistake(f"there is no folder {address}, and an address begins with http://")
        if not name.strip(". ") or Path(name).name != name:
            raise Mistake(f"{name!r} cannot be the name of a folder; take a plain one")
        target = Path(address, name, "progress.json")
        target.parent.mkdir(exist_ok=True)
        new = target.with_suffix(".new")
        new.write_bytes(progress.PROGRESS.read_bytes() if progress.PROGRESS.exists() else b"{}")
        os.replace(new, target)
        return
    sent = {"name": name, "marks": progress.state()}
    answer = httpx.post(address, json=sent, timeout=_PATIENCE, trust_env=False)
    if answer.status_code != 200:
        try:
            reason = str(answer.json()["detail"])
        except (ValueError, KeyError, TypeError):
            reason = f"status {answer.status_code}"
        raise Mistake(f"{address} does not take it: {reason}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Share, and share again whenever something has changed, until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="lab.py join", description=__doc__)
    parser.add_argument("address", metavar="ADDRESS")
    parser.add_argument("name", metavar="NAME", help="as the room is to see you")
    options = parser.parse_args(arguments)
    shared: progress.State | None = None
    is_reached: bool | None = None  # None: not tried yet
    while True:
        marks = progress.state()
        if marks != shared or not is_reached:
            was_reached = is_reached
            try:
                share(options.address, options.name)
                shared, is_reached = marks, True
            except (OSError, httpx.TransportError) as error:
                is_reached = False
                if was_reached is not False:
                    print(f"The room cannot be reached ({error}); trying again.", flush=True)
            if is_reached and not was_reached:
                print(f"You share your marks as {options.name!r}. Ctrl-C ends it.", flush=True)
        time.sleep(_PAUSE)


if __name__ == "__main__":
    try:
        main()
    except Mistake as mistake:
        sys.exit(f"lab.py join: {mistake}")
    except KeyboardInterrupt:
        print("You share nothing any more; the room keeps what it saw last.")
