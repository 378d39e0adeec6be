"""The files of a new exercise: `python3 lab.py new exercise NN name_of_the_subject`, for maintainers.

What it writes works as it is: a task that is given wrong, its solution, its check with one demand, and two answers that
prove the check. Change them from there.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from workshop.exercises import ROOT, SOLUTION_TAG, SOLUTIONS, TASK_TAG
from workshop.mistake import Mistake

_TASK = "price_for_each"

_GIVEN = """\
async def price_for_each(Session, sku):
    async with Session() as session:
        price = await session.scalar(select(Product.unit_price).where(Product.sku == sku))
        async with Session() as second:
            return price + 0 * await second.scalar(select(Product.sku).where(Product.sku == sku))
"""
_SOLVED = """\
async def price_for_each(Session, sku):
    async with Session() as session:
        return await session.scalar(select(Product.unit_price).where(Product.sku == sku))
"""

_PACKAGE = '''\
"""The checks of exercise {number}: say here what its tasks have in common."""

from workshop.checks.{subject}.{task} import {task}

__all__ = ["{task}"]
'''

_CHECK = '''\
"""Exercise {number}, task 1: say here in a line what the learner mends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import async_sessionmaker

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Work, evidence
from workshop.checks.lent import Conditions, connections
from workshop.checks.rules import ENGINES, USE_OF_POOLS
from workshop.checks.task import Task
from workshop.shop import Product


@dataclass(kw_only=True)
class Prices(Work):
    """What the calls returned: `wanted` is the shop's price, `returned` are the prices that came."""

    wanted: Any
    returned: list[Any]


async def ask_for_prices(
    {task}: Callable[..., Any], conditions: Conditions, *, calls: int, capacity: int, sku: int
) -> Prices:
    """So many customers ask for a price at once. This runs in a process of its own, under observation."""
    engine, returned = conditions.engine(capacity), []
    async with evidence(conditions, engine) as noted:
        sessions = async_sessionmaker(engine)

        async def ask(_: int) -> None:
            returned.append(await {task}(sessions, sku))

        await storm(ask, calls)
    async with engine.connect() as connection:
        wanted = await connection.scalar(select(Product.unit_price).where(Product.sku == sku))
    await engine.dispose()
    done = sum(price == wanted for price in returned)
    return Prices(**vars(noted), wanted=wanted, returned=returned, done=done)


def demands(run: Recording, seen: Prices) -> Iterator[Finding]:
    """Hold each sentence of the task's text here: an `if`, and a Finding with what was seen."""
    if seen.done < run.announced:
        yield Finding(
            "guesses-the-price",
            f"{{run.announced - seen.done}} of {{run.announced}} calls returned another price than the shop's.",
        )


def prove(run: Recording, seen: Prices) -> str:
    """What a run of a right answer has shown."""
    return (
        f"{{run.completed}} of {{run.announced}} calls answered with {{connections(run)}}, 0 deadlocks, 0 timeouts."
    )


{task} = Task(
    "{number}",
    "{task}",
    "{task}",
    load=ask_for_prices,
    trials=(
        {{"calls": 30, "capacity": 5, "sku": 1082185}},
        {{"calls": 10, "capacity": 1, "sku": 1029743}},
    ),
    rules=(*ENGINES, *USE_OF_POOLS),
    demands=(demands,),
    proof=prove,
    hints=("A first hint: where to look.", "A second one: what to change."),
)
'''

_ANSWERS = '''\
"""Answers to the tasks of exercise {number}, right and wrong, as people give them."""

from __future__ import annotations

from sqlalchemy import select

from answers import Answers
from workshop.shop import Product


async def one_session(Session, sku):
    async with Session() as session:
        return await session.scalar(select(Product.unit_price).where(Product.sku == sku))


async def a_helper_of_its_own(Session, sku):
    async with Session() as session:
        await session.scalar(select(Product.sku).where(Product.sku == sku))
        return await one_session(Session, sku)


async def a_price_from_memory(Session, sku):
    return 1


ANSWERS = {{
    "{task}": Answers(
        right=[one_session],
        wrong=[
            (a_helper_of_its_own, "holds-and-waits"),
            (a_price_from_memory, "guesses-the-price"),
        ],
    ),
}}
'''


def _solution(number: str, subject: str) -> NotebookNode:
    """The notebook that holds the whole exercise."""
    title = subject.replace("_", " ").capitalize()
    check = f"check-{_TASK.replace('_', '-')}"
    solution = {"tags": [SOLUTION_TAG]}
    solved = {"tags": [SOLUTION_TAG, f"{TASK_TAG}{_TASK}"]}
    notebook: NotebookNode = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {
                "display_name": "Python 3 (ipykernel)",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        },
        cells=[
            nbformat.v4.new_markdown_cell(
                f"# Exercise {number}: {title}\n\n"
                "**What you will do.** Say it in two sentences.\n\n"
                "**How it works.** Change the function, run its cell, then run the check below it. `hint()` gives a "
                f"hint, and `python3 lab.py reset {number}` brings this notebook back and keeps your version.\n\n"
                f"**What you need.** Name the lesson.\n\n**Time.** 10 minutes."
            ),
            nbformat.v4.new_code_cell(
                "%load_ext workshop\n\nfrom sqlalchemy import select\n\nfrom workshop.shop import Product"
            ),
            nbformat.v4.new_markdown_cell(
                "## Task 1: The price\n\nSay what the function is for.\n\n"
                f"**Mend `{_TASK}`** so that it returns the shop's price on *any* pool."
            ),
            nbformat.v4.new_code_cell(_GIVEN.rstrip()),
            nbformat.v4.new_markdown_cell("### A solution\n\nSay why.", metadata=solution),
            nbformat.v4.new_code_cell(_SOLVED.rstrip(), metadata=solved),
            nbformat.v4.new_code_cell(
                f"from workshop.checks import {subject} as check\n\ncheck.{_TASK}({_TASK})",
                id=check,
                metadata={"tags": ["verdict"]},
            ),
            nbformat.v4.new_code_cell(f"# check.{_TASK}.hint()"),
            nbformat.v4.new_markdown_cell(
                "## On your own\n\n* What to look for in one's own service."
            ),
        ],
    )
    return notebook


def new_exercise(number: str, subject: str) -> list[Path]:
    """Write the files of an exercise; raises Mistake where the number is taken or a name is none."""
    if not re.fullmatch(r"\d\d", number):
        raise Mistake(f"{number!r} is no number of an exercise; two digits are wanted, as in 08.")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", subject):
        raise Mistake(
            f"{subject!r} is no name; small letters and _ are wanted, as in the_blocked_loop."
        )
    names = {"number": number, "subject": subject, "task": _TASK}
    checks = ROOT / "workshop" / "checks" / subject
    texts = {
        checks / "__init__.py": _PACKAGE.format(**names),
        checks / f"{_TASK}.py": _CHECK.format(**names),
        ROOT / "tests" / "answers" / f"exercise_{number}.py": _ANSWERS.format(**names),
    }
    solution = SOLUTIONS / f"{number}_{subject}.ipynb"
    taken = [path for path in (*SOLUTIONS.glob(f"{number}_*"), *texts) if path.exists()]
    if taken:
        raise Mistake(
            f"{taken[0].relative_to(ROOT)} is there already; take another number or name."
        )
    checks.mkdir()
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    nbformat.write(_solution(number, subject), solution)
    return [solution, *texts]


def main() -> None:
    """Write the files, and say which, and what is left to do."""
    parser = argparse.ArgumentParser(prog="lab.py new", description=__doc__)
    parser.add_argument("kind", choices=["exercise"])
    parser.add_argument("number", help="two digits; there may be a lesson with the same")
    parser.add_argument("subject", help="as the notebook is to be called, without its number")
    arguments = parser.parse_args()
    try:
        for path in new_exercise(arguments.number, arguments.subject):
            print(path.relative_to(ROOT))
    except Mistake as mistake:
        sys.exit(f"lab.py: {mistake}")
    number = arguments.number
    print(f"Then: python3 lab.py refresh {number}, and python3 lab.py test -k exercise_{number}")


if __name__ == "__main__":
    main()
