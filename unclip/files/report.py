"""A report as one HTML file: tables, curves and galleries of pictures, readable offline and safe.

The file loads nothing from a network and runs no script: a Content-Security-Policy forbids both,
pictures are data URIs, plots are inline SVG, and every text is escaped, so a hostile caption is
only text.
"""

import base64
import dataclasses
import io
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np
from PIL import Image

from unclip.files import replacing

TEMPLATES = pathlib.Path(__file__).parent / "templates"
# Mid tones, readable on a white page and on a dark one.
COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#ec4899", "#84a30b")
LOSSLESS_SIDE = 128
# Matplotlib has no `currentColor`; these stand for it and for the grid until the SVG is written.
_INK, _GRID = "#010203", "#040506"


@dataclasses.dataclass
class Row:
    """A row of a gallery.

    Attributes:
      caption: the text beside the pictures.
      images: uint8 [H, W, 3] pictures, one per column; None leaves a cell empty.
      badges: (text, good) pairs: good True is green, False red, None neutral.
      note: a smaller second line.
    """

    caption: str
    images: Sequence[np.ndarray | None]
    badges: Sequence[tuple[str, bool | None]] = ()
    note: str = ""


class Report:
    """Collects blocks in order and writes them as one self-contained HTML file.

    Every method that adds a block returns the report, so calls can be chained.
    """

    def __init__(self, title: str, subtitle: str = ""):
        """Takes the page's title and the line below it."""
        self._title = title
        self._subtitle = subtitle
        self._blocks: list[dict[str, Any]] = []

    def section(self, title: str, text: str = "") -> "Report":
        """Starts a section; an empty line in `text` starts a paragraph."""
        paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
        return self._add("section", title=title, paragraphs=paragraphs)

    def tiles(self, values: Mapping[str, Any]) -> "Report":
        """Shows a few numbers large, each with its name."""
        return self._add("tiles", items=[(name, _text(value)) for name, value in values.items()])

    def table(
        self,
        rows: Iterable[Mapping[str, Any] | Sequence[Any]],
        columns: Sequence[str] | None = None,
        *,
        caption: str = "",
        best: Mapping[str, str] | None = None,
    ) -> "Report":
        """Adds a table.

        Args:
          rows: mappings by column name, or sequences in the order of `columns`.
          columns: headings; None takes the keys of the first row.
          caption: a line above the table.
          best: {column: "min" or "max"}, whose best number is set in bold.
        """
        rows = list(rows)
        if columns is None:
            if not rows or not isinstance(rows[0], Mapping):
                raise ValueError("a table without columns needs rows that are mappings")
            columns = list(rows[0])
        cells = [
            [row.get(name) for name in columns] if isinstance(row, Mapping) else list(row)
            for row in rows
        ]
        if any(len(line) != len(columns) for line in cells):
            raise ValueError(f"a row of the table does not have {len(columns)} cells")
        bold = set()
        for name, direction in (best or {}).items():
            column = list(columns).index(name)
            numbers = [(line[column], i) for i, line in enumerate(cells) if _finite(line[column])]
            if numbers:
                top = {"min": min, "max": max}[direction](value for value, _ in numbers)
                bold |= {(i, column) for value, i in numbers if value == top}
        numeric = [
            any(map(_is_number, column)) and all(v is None or _is_number(v) for v in column)
            for column in (zip(*cells) if cells else [()] * len(columns))
        ]
        shown = [
            [
                {"text": _text(value), "number": numeric[j], "best": (i, j) in bold}
                for j, value in enumerate(line)
            ]
            for i, line in enumerate(cells)
        ]
        heads = list(zip(columns, numeric))
        return self._add("table", columns=heads, rows=shown, caption=caption)

    def curves(
        self,
        series: Mapping[str, Sequence[tuple[float, float]]],
        title: str = "",
        xlabel: str = "",
        ylabel: str = "",
        logy: bool = False,
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> "Report":
        """Adds a plot of one or more lines, {name: [(x, y), …]}; neighbours share a row.

        Args:
          labels: {name: one text per point}, written beside the points of that line.
        """
        for name, texts in (labels or {}).items():
            if len(texts) != len(series[name]):
                raise ValueError(f"{len(texts)} labels for {len(series[name])} points of {name!r}")
        above = self._blocks[-1] if self._blocks else {"kind": ""}
        number = len(above["plots"]) if above["kind"] == "plots" else 0
        salt = f"plot-{len(self._blocks)}-{number}"
        svg = markupsafe.Markup(_svg(series, xlabel, ylabel, logy, salt, labels or {}))
        plot = {"title": title, "svg": svg}
        if self._blocks and self._blocks[-1]["kind"] == "plots":
            self._blocks[-1]["plots"].append(plot)
            return self
        return self._add("plots", plots=[plot])

    def gallery(
        self,
        rows: Iterable[Row | Mapping[str, Any]],
        columns: Sequence[str],
        *,
        caption: str = "",
    ) -> "Report":
        """Adds pictures in rows: a caption, then a picture under each of `columns`.

        Rows are `Row`s or mappings with the same fields. Small pictures are enlarged with square
        pixels.
        """
        shown = []
        for row in rows:
            row = row if isinstance(row, Row) else Row(**row)
            if len(row.images) != len(columns):
                raise ValueError(f"{len(row.images)} pictures for {len(columns)} columns")
            shown.append(
                {
                    "caption": row.caption,
                    "note": row.note,
                    "badges": [
                        (text, {True: "good", False: "bad", None: "neutral"}[good])
                        for text, good in row.badges
                    ],
                    "cells": [None if image is None else _picture(image) for image in row.images],
                }
            )
        return self._add("gallery", columns=list(columns), rows=shown, caption=caption)

    def settings(self, values: Mapping[str, Any], title: str = "Settings") -> "Report":
        """Adds names and values, collapsed at first; nested mappings become dotted names."""
        return self._add("settings", title=title, items=list(_dotted(values)))

    def html(self) -> str:
        """The whole page."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        template = environment.get_template("report.html")
        return template.render(title=self._title, subtitle=self._subtitle, blocks=self._blocks)

    def write(self, path: str | os.PathLike) -> pathlib.Path:
        """Writes the page atomically and returns its path.

        Raises:
          DataError: the file cannot be written.
        """
        page = self.html()
        with replacing(path) as temporary:
            # A lone surrogate, e.g. of an undecodable file name, must not prevent the report.
            temporary.write_text(page, encoding="utf-8", errors="replace")
        return pathlib.Path(path)

    def _add(self, kind: str, **content: Any) -> "Report":
        self._blocks.append({"kind": kind, "id": f"b{len(self._blocks)}", **content})
        return self


def _picture(image: np.ndarray) -> dict[str, Any]:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"a picture is uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    small = max(height, width) <= LOSSLESS_SIDE
    buffer = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image))
    if small:
        picture.save(buffer, format="PNG", optimize=True)
    else:
        picture.save(buffer, format="WEBP", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {
        "src": f"data:image/{'png' if small else 'webp'};base64,{data}",
        "width": width,
        "height": height,
        "small": small,
    }


def _svg(series: Mapping, xlabel: str, ylabel: str, logy: bool, salt: str, labels: Mapping) -> str:
    # Imported here: it takes a second, and a report may have no plot.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _INK,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": _GRID,
        "grid.linewidth": 0.6,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "axes.unicode_minus": False,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.8, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for number, (name, points) in enumerate(series.items()):
            x, y = zip(*points) if points else ((), ())
            colour = COLOURS[number % len(COLOURS)]
            marker = "o" if len(x) <= 12 else None
            # Matplotlib leaves labels with a leading "_" out of a legend.
            label = f"\u200b{name}" if str(name).startswith("_") else str(name)
            axes.plot(x, y, color=colour, linewidth=1.8, marker=marker, markersize=4, label=label)
            for point, text in zip(points, labels.get(name, ())):
                axes.annotate(
                    str(text), point, xytext=(4, 4), textcoords="offset points", fontsize=8
                )
        if logy:
            axes.set_yscale("log")
            # The default writes powers of ten in TeX, which stays off: labels come from users.
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.margins(x=0.02)
        axes.set_axisbelow(True)
        if len(series) > 4:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        elif len(series) > 1:
            axes.legend(frameon=False, fontsize=9)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    # Comments would repeat labels outside the escaping of text nodes.
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    # Several figures share a page: their ids must differ. The viewBox alone gives the size.
    text = re.sub(r'\bid="', f'id="{salt}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{salt}-", text)
    text = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', _open_svg, text, count=1)
    # A page-wide rule: `*` in an inline SVG's stylesheet reaches beyond the SVG.
    text = re.sub(r'<style type="text/css">.*?</style>', "", text, count=1, flags=re.DOTALL)
    return text.replace(_INK, "currentColor").replace(_GRID, "var(--line)")


def _open_svg(match: re.Match) -> str:
    return (
        f'<svg viewBox="{match[1]}" role="img" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}" if abs(int(value)) >= 10_000 else str(int(value))
    if isinstance(value, float | np.floating):
        return f"{float(value):.4g}"
    return str(value)


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
