"""The learner's own copies of the lessons and exercises, in `my_notebooks`; `python3 lab.py reset` brings one back.

What is stored has its outputs, for who reads it; they would tell before a prediction what will be seen. So
`python3 lab.py` opens copies without outputs, in a folder that git ignores. A copy that its learner has not
changed follows what is stored; one that was worked on stays. All copies are in one folder, beside the stored
ones, and an exercise has a name of its own there, for JupyterLab's tabs show names only. As in
`workshop.exercises`, notebooks are read as the JSON that they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from workshop.exercises import EXERCISES, MY_NOTEBOOKS, ROOT
from workshop.mistake import Mistake

LESSONS = ROOT / "notebooks"
KEPT = MY_NOTEBOOKS / "kept"  # what a reset has put aside
# In a copy's own metadata: which text it was made with.
_MADE_WITH = "made_with"

_Notebook = dict[str, Any]


def copies() -> dict[Path, Path]:
    """The copy of each lesson and each exercise, by the path of what is stored."""
    lessons = {path: MY_NOTEBOOKS / path.name for path in sorted(LESSONS.glob("[0-9]*.ipynb"))}
    exercises = {
        path: MY_NOTEBOOKS / f"{path.name[:2]}b_exercise.ipynb"
        for path in sorted(EXERCISES.glob("[0-9]*.ipynb"))
    }
    return lessons | exercises


def prepare() -> None:
    """Make the copies that are missing, and anew those that are out of date and not worked on."""
    MY_NOTEBOOKS.mkdir(exist_ok=True)
    for stored, copy in copies().items():
        wanted = _copy_of(stored)
        if not copy.exists():
            _write(wanted, copy)
        elif _made_with(copy) == wanted["metadata"][_MADE_WITH]:
            continue  # with the learner's outputs, where they are
        elif is_untouched(copy):
            _write(wanted, copy)
        else:
            option = "--lesson " if stored.parent == LESSONS else ""
            print(
                f"{_shown(copy)} stays as you left it, though the {_kind(stored.parent)} has changed since;"
                f" python3 lab.py reset {option}{stored.name[:2]} brings the new one."
            )
    for copy in set(MY_NOTEBOOKS.glob("*.ipynb")) - set(copies().values()):
        if is_untouched(copy):  # of a lesson that is gone, or has another name
            copy.unlink()


def reset(stored: Path) -> None:
    """Bring the copy of a stored notebook back as it was made; what the learner has changed is kept."""
    copy = copies()[stored]
    MY_NOTEBOOKS.mkdir(exist_ok=True)
    if copy.exists() and not is_untouched(copy):
        KEPT.mkdir(exist_ok=True)
        moment = datetime.now().strftime("%Y-%m-%d %H.%M.%S")
        kept = KEPT / f"{copy.stem} {moment}.ipynb"
        number = 1
        while kept.exists():
            number += 1
            kept = KEPT / f"{copy.stem} {moment} ({number}).ipynb"
        copy.rename(kept)
        print(f"Your version is kept as {_shown(kept)}")
    _write(_copy_of(stored), copy)
    print(f"{_shown(copy)} is as it was made; reload it where it is open (menu File).")


def is_untouched(copy: Path) -> bool:
    """Whether a copy has the text that it was made with; its outputs, and cells with nothing in them, do not count."""
    made_with = _made_with(copy)
    return made_with is not None and made_with == _digest(_read(copy))


def _stored(folder: Path, number: str) -> Path:
    """The lesson or exercise with this number ("1" or "01"); raises Mistake where there is none."""
    known = {path.name[:2]: path for path in copies() if path.parent == folder}
    if number.zfill(2) not in known:
        raise Mistake(f"There is no {_kind(folder)} {number}; there are {', '.join(known)}.")
    return known[number.zfill(2)]


def _kind(folder: Path) -> str:
    return "lesson" if folder == LESSONS else "exercise"


def _made_with(copy: Path) -> str | None:
    """The digest of the text that a copy was made with; None where it does not tell, or is no notebook any more."""
    try:
        found: str = _read(copy)["metadata"][_MADE_WITH]
    except (ValueError, KeyError, TypeError):
        return None
    return found


def _copy_of(stored: Path) -> _Notebook:
    """A stored notebook without its outputs, with links that lead on from the folder of the copies."""
    notebook = _read(stored)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
        else:
            cell["source"] = re.sub(
                r"(?<=\]\()(?!\w+:)[^)#]+",
                lambda link: _from_copies(stored.parent / link.group()),
                _text(cell),
            )
    notebook["metadata"][_MADE_WITH] = _digest(notebook)
    return notebook


def _from_copies(target: Path) -> str:
    """What a link in the folder of the copies must say to lead to a file, or to its copy."""
    target = Path(os.path.normpath(target))
    return Path(os.path.relpath(copies().get(target, target), MY_NOTEBOOKS)).as_posix()


def _digest(notebook: _Notebook) -> str:
    texts = [(cell["cell_type"], _text(cell)) for cell in notebook["cells"]]
    # JupyterLab adds an empty cell by itself, where somebody runs the last one.
    written = [(kind, text) for kind, text in texts if text.strip()]
    return hashlib.sha256(json.dumps(written).encode()).hexdigest()


def _text(cell: dict[str, Any]) -> str:
    """The source of a cell, which a file may have as lines."""
    return "".join(cell["source"])


def _read(path: Path) -> _Notebook:
    notebook: _Notebook = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def _write(notebook: _Notebook, path: Path) -> None:
    """Write a notebook in one stroke: it may be open in JupyterLab."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def main() -> int:
    """Carry out one command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="lab.py reset")
    parser.add_argument("--lesson", action="store_true", help="lessons instead of exercises")
    parser.add_argument("numbers", nargs="+", metavar="NN", help="their numbers")
    arguments = parser.parse_args()
    try:
        for number in arguments.numbers:
            reset(_stored(LESSONS if arguments.lesson else EXERCISES, number))
    except (Mistake, OSError) as mistake:
        print(mistake, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
