"""A picture: one look, one meaning for each colour, texts that can be read, a text alternative."""

from __future__ import annotations

import base64
import html
import io
import re
from pathlib import Path
from typing import Any

import matplotlib.colors
import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

# Okabe and Ito's palette, which colour-blind people can tell apart; each meaning keeps its colour in every picture.
CHECKED_OUT = "#0072B2"
WAITING = "#D55E00"
CAPACITY = "#000000"
COMPLETED = "#009E73"
FAILED = "#CC79A7"
LOOP_LAG = "#E69F00"
MEMORY = "#56B4E9"
OBJECTS = "#6B6B6B"
OTHER = "#444444"  # what has no colour of its own

STYLE = Path(__file__).with_name("style.mplstyle")

FINAL_DPI = 180
SHOWN_WIDTH = 900  # pixels in the notebook
_LEAST_CONTRAST = 4.6  # of a text with white; WCAG wants 4.5, and colours are rounded


class Picture:
    """A figure with its text alternative; a notebook shows it as an image that carries both.

    `title` is the plain-text form, the same in every run; `alternative` describes the data.
    """

    def __init__(self, figure: Figure, title: str, alternative: str) -> None:
        self.figure, self.title, self.alternative = figure, title, alternative
        for label in figure.findobj(Text):
            label.set_color(ink(label.get_color()))

    def __repr__(self) -> str:
        return f"<Picture: {self.title}>"

    def _repr_html_(self) -> str:
        return self.html()

    def html(self, dpi: int = FINAL_DPI) -> str:
        """The picture as an `<img>` element: what a notebook shows and stores.

        Of a plain PNG, JupyterLab drops the text alternative, and nbconvert writes that there is none.
        """
        png = base64.b64encode(self.png(dpi)).decode()
        height = round(SHOWN_WIDTH * self.figure.get_figheight() / self.figure.get_figwidth())
        alternative = html.escape(self.alternative)
        return f'<img alt="{alternative}" width="{SHOWN_WIDTH}" height="{height}" src="data:image/png;base64,{png}">'

    def png(self, dpi: int = FINAL_DPI) -> bytes:
        """The picture as a PNG file's bytes."""
        self.figure.set_dpi(dpi)
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        pixels = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
        data = io.BytesIO()
        if dpi >= FINAL_DPI:
            # 48 colours are plenty, and make the file that a notebook stores four times smaller.
            pixels.convert("RGB").quantize(48, dither=Image.Dither.NONE).save(data, "PNG")
        else:  # one that is soon replaced: to find the 48 would take a third of its drawing
            pixels.convert("RGB").save(data, "PNG", compress_level=1)
        return data.getvalue()


def stored_picture(markup: str) -> tuple[str, bytes] | None:
    """The text alternative and the PNG of a picture, from what `Picture.html` gave; None for any other HTML."""
    found = re.fullmatch(r'<img alt="([^"]*)".* src="data:image/png;base64,([^"]+)">', markup)
    return found and (html.unescape(found[1]), base64.b64decode(found[2]))


def contrast(color: Any) -> float:
    """The contrast of a colour with white, 1 to 21 (WCAG 2.2, "contrast ratio")."""
    return 1.05 / (_luminance(_linear(color)) + 0.05)


def ink(color: Any) -> Any:
    """The colour for a text: the same, or darker where it could not be read on white well enough."""
    linear = _linear(color)
    darker = min(1.0, (1.05 / _LEAST_CONTRAST - 0.05) / max(_luminance(linear), 1e-9))
    if darker == 1.0:
        return color
    return tuple(
        12.92 * part if part <= 0.0031308 else 1.055 * part ** (1 / 2.4) - 0.055
        for part in (darker * part for part in linear)
    )


def _linear(color: Any) -> list[float]:
    return [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in matplotlib.colors.to_rgb(color)
    ]


def _luminance(linear: list[float]) -> float:
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def new_figure(width: float = 10.0, height: float = 4.6) -> Figure:
    """An empty figure in the project's look, in inches; draw on it within `look()`."""
    return Figure(figsize=(width, height), layout="constrained")


def look() -> Any:
    """The project's look, as a context manager."""
    return matplotlib.style.context(STYLE)
