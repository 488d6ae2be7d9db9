"""The building blocks of a report's page: tables, plots, legend, the document. Text becomes HTML here, escaped."""

from __future__ import annotations

from html import escape
from pathlib import Path

from cu_runner.reporting.page_data import Shown
from cu_runner.reporting.page_plots import COLOURS, look

SHAPES = {  # the markers of matplotlib, around (15, 6)
    "o": '<circle cx="15" cy="6" r="3.2"/>',
    "s": '<path d="M12 3h6v6h-6z"/>',
    "^": '<path d="M15 2.2l3.6 6.6h-7.2z"/>',
    "D": '<path d="M15 1.8l4.2 4.2l-4.2 4.2l-4.2-4.2z"/>',
    "v": '<path d="M15 9.8l3.6-6.6h-7.2z"/>',
    "P": '<path d="M13.7 2.4h2.6v2.3h2.3v2.6h-2.3v2.3h-2.6v-2.3h-2.3v-2.6h2.3z"/>',
    "X": '<path d="M12.6 2l2.4 2.4l2.4-2.4l1.6 1.6l-2.4 2.4l2.4 2.4l-1.6 1.6l-2.4-2.4l-2.4 2.4l-1.6-1.6l2.4-2.4l-2.4-2.4z"/>',
}


MOST_ENTRIES = 24  # of a legend that is not folded


def document(title: str, lead: str, sections: dict[str, str]) -> str:
    """The page: title, one sentence, a table of contents, the sections by title. lead and sections are HTML."""
    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    contents = "".join(
        f'<li><a href="#{anchor}">{escape(name)}</a></li>' for name, anchor in anchors.items()
    )
    body = "".join(
        f'<section id="{anchors[name]}"><h2>{escape(name)}</h2>\n{html}</section>\n'
        for name, html in sections.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title>\n<style>\n{variables()}{css()}</style></head>\n<body>"
        f'<header><h1>{escape(title)}</h1><p class="lead">{lead}</p></header>\n'
        f'<div class="page"><nav aria-label="Contents"><ol>{contents}</ol></nav>\n<main>{body}</main></div></body></html>\n'
    )


def css() -> str:
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def variables() -> str:
    """The colours: light ones, and dark ones on a screen that prefers them."""
    light, dark = (
        "".join(f"--{name}:{pair[side]};" for name, pair in COLOURS.items()) for side in (0, 1)
    )
    return f":root{{{light}color-scheme:light}}\n@media screen and (prefers-color-scheme: dark){{:root{{{dark}color-scheme:dark}}}}\n"


def table(head: list[str], rows: list[list[str]], caption: str) -> str:
    """A table that scrolls in its own box. head and rows are HTML, the first of each row names it; caption is text."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{cells[0]}</th>{"".join(map(data_cell, cells[1:]))}</tr>\n'
        for cells in rows
    )
    return scrolled(
        f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>\n<tbody>{lines}</tbody></table>",
        caption,
    )


def data_cell(html: str) -> str:
    """A cell; what is a cell already stays one."""
    return html if html.startswith("<td") else f"<td>{html}</td>"


def scrolled(html: str, name: str) -> str:
    """A box that scrolls by itself and can be reached by keyboard."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">{html}</div>\n'
    )


def plot(svg: str, description: str, numbers: str) -> str:
    """A plot and, folded below it, its numbers as a table. svg and numbers are HTML."""
    drawn = svg.replace(
        "<svg ",
        f'<svg role="img" aria-label="{escape(description)}; the table below has the numbers" ',
        1,
    )
    return f'<figure class="plot">{drawn}<details><summary>Numbers</summary>{numbers}</details></figure>\n'


def swatch(shown: Shown) -> str:
    """The line and the marker of a run."""
    style = look(shown.number)
    dashes = f' stroke-dasharray="{" ".join(map(str, style.dashes))}"' if style.dashes else ""
    colour = f"var(--series-{style.colour})"
    return (
        f'<svg class="swatch" viewBox="0 0 30 12" aria-hidden="true" fill="{colour}" stroke="none">'
        f'<path d="M0 6h30" fill="none" stroke="{colour}" stroke-width="1.6"{dashes}/>{SHAPES[style.marker]}</svg>'
    )


def named(shown: Shown, label: str | None = None) -> str:
    """Swatch and label of a run; without one its title, which says when it is unfinished."""
    return f'<span class="run">{swatch(shown)}<span>{escape(label or shown.title)}</span></span>'


def legend(runs: list[Shown]) -> str:
    """Swatches and labels; folded when they would fill the screen."""
    entries = f'<ul class="legend">{"".join(f"<li>{named(shown)}</li>" for shown in runs)}</ul>'
    return (
        entries
        if len(runs) <= MOST_ENTRIES
        else f"<details><summary>Legend, {len(runs)} runs</summary>{entries}</details>"
    )
