"""`python3 lab.py slides`: slides of each lesson, made of its notebook and of the guide for instructors.

A slide has one idea: a section's name, a question, a cell, a picture, what a cell printed, or a list. The prose
between them is in the speaker's notes (key S), and so is what the guide says of the lesson. Pictures and outputs are
the stored ones; nothing is executed. Sphinx and reveal.js come as for the website; the slides need no network.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workshop import website

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "instructor" / "slides"
# A slide is 1280 × 720 pixels; what stands below its heading has this much room, and a letter these proportions.
_HEIGHT, _WIDTH = 570, 1180
_LINE_HEIGHT, _LETTER_WIDTH = 1.35, 0.61
_SIZES = range(12, 29, 2)  # pixels, of letters in code: see slides.css
_DENSE = 75  # words of a list; with more of them it has smaller letters
_SHORT = 60  # words of a section's first paragraph, which is then shown as it is
_A_LIST = re.compile(r"^(?:\* |\d+\. |\| )")

Cell = dict[str, Any]


@dataclass
class Slide:
    """One idea: what is shown (MyST), and what the speaker says with it."""

    title: str
    shown: str = ""
    level: int = 3
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{'#' * self.level} {self.title}", self.shown]
        if self.notes:
            parts.append(
                "\n".join([":::{revealjs-notes}", *"\n\n".join(self.notes).splitlines(), ":::"])
            )
        return "\n\n".join(part for part in parts if part) + "\n"


def slides_of(cells: Sequence[Cell], page: str) -> list[Slide]:
    """The slides of a lesson; `page` is the guide's page on it.

    Each paragraph of prose goes to the notes of the slide before it, so that the speaker says it before the next.
    """
    title, *paragraphs = _source(cells[0]).split("\n\n")
    slides = [Slide(title.removeprefix("# "), _labelled("Time", paragraphs), 1, [page])]
    slides.append(Slide("What you will do", _labelled("What you will do", paragraphs), 2))
    for cell in cells[1:]:
        if cell["cell_type"] == "code":
            slides += _of_code(cell)
            continue
        for block in _blocks(_source(cell)):
            if block.startswith("#"):
                slides.append(Slide(block.lstrip("# "), level=2 if block.startswith("## ") else 3))
            elif block.startswith("**Predict.** "):
                slides.append(Slide("Predict", block.removeprefix("**Predict.** ")))
            elif _A_LIST.match(block):
                _put_list(slides, block)
            elif slides[-1].title == "Predict":
                slides[-1].shown += f"\n\n{block}"
            elif not slides[-1].shown:
                _put_first(slides[-1], block)
            else:
                slides[-1].notes.append(block)
    return slides


def _of_code(cell: Cell) -> Iterator[Slide]:
    source = _source(cell)
    printed, picture = _outputs(cell)
    names = re.findall(r"^(?:async )?(?:def|class) (\w+)", source, re.MULTILINE)
    if picture:
        alternative = re.search(r'<img alt="([^"]*)"', picture)
        title = " ".join(alternative[1].split()).partition(". ")[0] if alternative else "A picture"
        yield Slide(title, f"```{{raw}} html\n{picture}\n```")
    elif printed:
        yield Slide("What it was", _framed(printed, "text"))
    elif names:
        yield Slide(f"`{names[0]}`", _framed(source, "python"))
    elif not source.startswith(("%load_ext", "my_prediction = ")) and "observe(" not in source:
        yield Slide("In code", _framed(source, "python"))


def _put_list(slides: list[Slide], block: str) -> None:
    """A list or a table: on the slide of its heading, or on one of its own."""
    if len(block.split()) > _DENSE:
        block = f":::{{container}} dense\n{block}\n:::"
    if slides[-1].shown:
        slides.append(Slide("In short", block))
    else:
        slides[-1].shown = block


def _put_first(slide: Slide, block: str) -> None:
    """The first paragraph below a heading, or its first sentence."""
    if len(block.split()) <= _SHORT:
        slide.shown = block
    else:
        slide.shown = re.split(r"(?<=[.?:]) ", block)[0]
        slide.notes.append(block)


def _framed(text: str, language: str) -> str:
    """A text as it is, in the largest letters with which it fits; a line that is wide breaks before these get tiny."""
    lines = text.rstrip().splitlines()
    fits = min(
        _HEIGHT / (_LINE_HEIGHT * len(lines)),
        max(_WIDTH / (_LETTER_WIDTH * max(map(len, lines))), _SIZES[5]),
    )
    size = max([size for size in _SIZES if size <= fits], default=_SIZES[0])
    frame = [
        f":::{{container}} size-{size}",
        f"````{{code-block}} {language}",
        *lines,
        "````",
        ":::",
    ]
    return "\n".join(frame)


def _outputs(cell: Cell) -> tuple[str, str]:
    """What a cell has printed, and its last picture, as HTML."""
    printed, picture = "", ""
    for output in cell["outputs"]:
        printed += "".join(output.get("text", []))
        page = "".join(output.get("data", {}).get("text/html", []))
        picture = page if "<img " in page else picture
    return printed.replace("you said None\n", ""), picture


def _blocks(source: str) -> list[str]:
    """Paragraphs, lists and fenced code, each as one."""
    return [block.strip("\n") for block in re.split(r"\n\n(?=\S)", source) if block.strip()]


def _labelled(label: str, paragraphs: Sequence[str]) -> str:
    (text,) = [text for text in paragraphs if text.startswith(f"**{label}.**")]
    return text.removeprefix(f"**{label}.** ")


def _source(cell: Cell) -> str:
    """Links of prose lead into the kit, where a slide is not; their words stay."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "code":
        return source
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", source)


def write(folder: Path) -> None:
    """Write the slides of each lesson as MyST, and a page that names them."""
    links = []
    for lesson in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page = (ROOT / "instructor" / f"{lesson.stem}.md").read_text("utf-8")
        slides = slides_of(
            json.loads(lesson.read_text("utf-8"))["cells"], page.partition("\n\n")[2]
        )
        (folder / f"{lesson.stem}.md").write_text("\n".join(map(str, slides)), "utf-8")
        links.append(f"* [{slides[0].title}](./{lesson.stem}.md)")
    first = Slide("SQLAlchemy under load", "Key S shows the speaker's notes.", 1)
    lessons = Slide("Lessons", "\n".join(links), 2)
    (folder / "index.md").write_text(f"{first}\n{lessons}", "utf-8")


def build(into: Path) -> int:
    """Build the slides and return the exit status."""
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary)
        shutil.copytree(FOLDER, source, dirs_exist_ok=True, ignore=shutil.ignore_patterns("built"))
        write(source)
        return website.sphinx("revealjs", source, source, into)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build them, and say where they are."""
    return website.command("slides", __doc__, build, FOLDER / "built", "index.html", arguments)


if __name__ == "__main__":
    sys.exit(main())
