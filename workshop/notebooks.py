"""Run the lessons without a browser: `python3 lab.py run [NN …]` and `python3 lab.py refresh [NN …]`.

`run` saves executed copies and their pictures below `executed/`; `refresh` stores the outputs in place, also those
of the solution and the exercise with the same number, which it makes anew.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from ormscope.lab.picture import stored_picture
from workshop.exercises import EXERCISES, ROOT, SOLUTIONS
from workshop.generator import generated
from workshop.kernels import SETTINGS
from workshop.mistake import Mistake

LESSONS, EXECUTED = ROOT / "notebooks", ROOT / "executed"
CELL_TIMEOUT = 120  # seconds; the longest cell of the lessons takes a tenth of it


class CellFailed(Mistake):
    """A cell of a notebook failed; the message names it."""


def _by_number(folder: Path) -> dict[str, Path]:
    return {path.name[:2]: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}


def lessons(numbers: list[str]) -> list[Path]:
    """The lessons with these numbers ("1" or "01"), or all; raises Mistake for a number that is none."""
    known = _by_number(LESSONS)
    unknown = [number for number in numbers if number.zfill(2) not in known]
    if unknown:
        raise Mistake(f"There is no lesson {', '.join(unknown)}; there are {', '.join(known)}.")
    return [known[number.zfill(2)] for number in numbers] or list(known.values())


def execute(
    path: Path, report: Callable[[int, int, NotebookNode, float], None] | None = None
) -> NotebookNode:
    """The notebook at `path`, executed from the first cell to the last in a fresh kernel.

    `report` is called after each code cell with its number, how many there are, the cell, and the seconds
    that it took. Raises CellFailed when a cell raises, lasts longer than two minutes, or ends the kernel, and where
    the kernel does not start.
    """
    notebook: NotebookNode = nbformat.read(path, as_version=4)
    code = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    started = time.monotonic()

    def executing(cell: NotebookNode, cell_index: int) -> None:
        nonlocal started
        started = time.monotonic()

    def executed(cell: NotebookNode, cell_index: int, execute_reply: dict[str, object]) -> None:
        if report is not None:
            report(code.index(cell_index) + 1, len(code), cell, time.monotonic() - started)

    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name=NATIVE_KERNEL_NAME,
        config=SETTINGS,
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_execute=executing,
        on_cell_executed=executed,
        record_timing=False,
        coalesce_streams=True,
    )
    try:
        # What cells print comes as messages; the kernel process itself only warns, and mutters as it dies.
        # The loop is ours: where a kernel does not start, nbclient leaves its handlers of signals on it.
        asyncio.run(client.async_execute(stderr=subprocess.DEVNULL))
    except CellExecutionError as error:
        raise CellFailed(f"{path.name}: a cell failed: {error.ename}: {error.evalue}") from error
    except CellTimeoutError as error:
        raise CellFailed(f"{path.name}: a cell did not end within {CELL_TIMEOUT} s.") from error
    except DeadKernelError as error:
        raise CellFailed(f"{path.name}: the kernel died.") from error
    except (RuntimeError, AssertionError) as error:
        # As where the loopback network is down; nbclient then takes the kernel down twice, and again
        # when Python ends, though it asserts that there is one.
        atexit.unregister(client._cleanup_kernel)
        reason = error.__context__ if isinstance(error, AssertionError) else error
        raise CellFailed(f"{path.name}: the kernel did not start: {reason}.") from error
    notebook.metadata = NotebookNode(
        kernelspec={
            "display_name": "Python 3 (ipykernel)",
            "language": "python",
            "name": NATIVE_KERNEL_NAME,
        },
        language_info={"name": "python"},
    )
    return notebook


def texts(cell: NotebookNode) -> str:
    """What a cell printed on standard output."""
    return "".join(
        output.text
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )


def pictures(cell: NotebookNode) -> Iterator[bytes]:
    """The pictures that a cell displayed, as PNG files."""
    for output in cell.outputs:
        if picture := stored_picture(output.get("data", {}).get("text/html", "")):
            yield picture[1]


def run(path: Path) -> None:
    """Execute one lesson; print a line for each cell and the verdicts; save the copy and its pictures."""
    target = EXECUTED / path.name
    target.parent.mkdir(exist_ok=True)

    def report(number: int, count: int, cell: NotebookNode, seconds: float) -> None:
        print(f"{path.stem}  cell {number:>2} of {count}  {seconds:5.1f} s", flush=True)
        if "verdict" in cell.metadata.get("tags", []):
            print("".join(f"    {line}\n" for line in texts(cell).splitlines()), end="", flush=True)
        for which, png in enumerate(pictures(cell), 1):
            target.with_name(f"{path.stem}_cell_{number:02}_{which}.png").write_bytes(png)

    nbformat.write(execute(path, report), target)
    print(f"{path.stem}  saved as {target.relative_to(ROOT)}", flush=True)


def refresh(path: Path) -> None:
    """Execute one notebook and store its outputs in place; a notebook that fails stays as it was.

    The picture of a cell with the tag "readme" is stored beside the notebook too, for README.md.
    """
    started = time.monotonic()
    notebook = execute(path)
    nbformat.write(notebook, path)
    for cell in notebook.cells:
        if "readme" in cell.metadata.get("tags", []):
            (picture,) = pictures(cell)
            path.with_suffix(".png").write_bytes(picture)
    print(f"{path.relative_to(ROOT)}  refreshed in {time.monotonic() - started:.1f} s", flush=True)


def refresh_exercise(solution: Path) -> None:
    """Refresh a solution, and make the exercise anew from it."""
    refresh(solution)
    exercise = EXERCISES / solution.name
    nbformat.write(generated(nbformat.read(solution, as_version=4)), exercise)
    refresh(exercise)


def refresh_all(numbers: list[str]) -> None:
    """Refresh the lessons and exercises with these numbers, or all; raises Mistake for a number that is none."""
    by_lesson, by_exercise = _by_number(LESSONS), _by_number(SOLUTIONS)
    wanted = [number.zfill(2) for number in numbers] or sorted({*by_lesson, *by_exercise})
    unknown = [number for number in wanted if number not in by_lesson | by_exercise]
    if unknown:
        raise Mistake(f"There is no lesson and no exercise {', '.join(unknown)}.")
    for number in wanted:
        if number in by_lesson:
            refresh(by_lesson[number])
        if number in by_exercise:
            refresh_exercise(by_exercise[number])


def main() -> int:
    """Carry out one command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="lab.py")
    parser.add_argument("command", choices=("run", "refresh"))
    parser.add_argument(
        "numbers",
        nargs="*",
        metavar="NN",
        help="numbers of lessons, or of exercises to refresh; all unless given",
    )
    arguments = parser.parse_args()
    try:
        if arguments.command == "refresh":
            refresh_all(arguments.numbers)
        else:
            for path in lessons(arguments.numbers):
                run(path)
    except Mistake as mistake:
        print(mistake, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
