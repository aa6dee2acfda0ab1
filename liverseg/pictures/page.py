"""One self-contained HTML page: tables, curves and a slice viewer; no server, no library, opens from a file."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from data_cache.files import replacing

WINDOWS = (
    {"name": "soft tissue", "hu": (-110, 190)},
    {"name": "liver", "hu": (-20, 180)},
    {"name": "wide", "hu": (-350, 450)},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCase:
    """A row of the page's table, and where its pictures are.

    Attributes:
        note: Below the case's name in the viewer.
        cells: Of the table after the name, a number or None as a number so that the column sorts.
        volumes: Gives the JSON text of a list of volumes as ``slices.encoded`` makes them; asked for once, when
            the page is written, so that one case at a time is in memory.
    """

    name: str
    note: str
    cells: tuple[float | str | None, ...]
    volumes: Iterator[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a page shows, from top to bottom.

    Attributes:
        sections: HTML between the title and the table of cases.
        columns: Headers of the cells, without the case's name.
        digits: Shown of each column's numbers.
        cases: In the order they are to be looked at.
    """

    title: str
    subtitle: str
    sections: tuple[str, ...]
    columns: tuple[str, ...]
    digits: tuple[int, ...]
    cases: Sequence[PageCase]


def write_page(page: Page, path: Path) -> Path:
    """Write the page, whole or not at all, one case after another; returns ``path``."""
    assets = files("liverseg.pictures") / "assets"
    template = (assets / "page.html").read_text(encoding="utf-8")
    before, after = template.split("{{data}}")
    filling = {
        "title": html.escape(page.title),
        "subtitle": html.escape(page.subtitle),
        "css": (assets / "page.css").read_text(encoding="utf-8"),
        "js": (assets / "page.js").read_text(encoding="utf-8"),
        "body": "\n".join([*page.sections, _case_table(page)]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(_filled(before, filling).encode())
        for block in _data_blocks(page):
            file.write(block.encode())
        file.write(_filled(after, filling).encode())
    return path


def html_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table of text; the first column is a heading."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headers)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _filled(template: str, filling: Mapping[str, str]) -> str:
    # Split and not replaced one after another: a title may hold {{css}}.
    first, *rest = template.split("{{")
    parts = [first]
    for piece in rest:
        name, tail = piece.split("}}", 1)
        parts += [filling[name], tail]
    return "".join(parts)


def _case_table(page: Page) -> str:
    headers = ("case", *page.columns)
    head = "".join(f'<th><button type="button">{html.escape(h)}</button></th>' for h in headers)
    rows = "\n".join(_case_row(page, index) for index in range(len(page.cases)))
    return (
        f'<h2>Cases</h2>\n<div class="scroll"><table id="table"><thead><tr>{head}</tr></thead>'
        f'<tbody id="rows">\n{rows}\n</tbody></table></div>'
    )


def _case_row(page: Page, index: int) -> str:
    case = page.cases[index]
    name = html.escape(case.name)
    cells = "".join(_cell(cell, digits) for cell, digits in zip(case.cells, page.digits, strict=True))
    opener = f'<button type="button" class="open" data-index="{index}">{name}</button>'
    return f'<tr data-index="{index}"><td data-value="{name}">{opener}</td>{cells}</tr>'


def _cell(cell: float | str | None, digits: int) -> str:
    if cell is None:
        return '<td data-value="">–</td>'
    if isinstance(cell, str):
        return f"<td>{html.escape(cell)}</td>"
    return f'<td data-value="{cell!r}">{cell:.{digits}f}</td>'


def _data_blocks(page: Page) -> Iterator[str]:
    names = [{"name": case.name, "note": case.note} for case in page.cases]
    yield _data_block("cases", json.dumps(names))
    yield _data_block("windows-hu", json.dumps(WINDOWS))
    for index, case in enumerate(page.cases):
        yield _data_block(f"volumes-{index}", f"[{','.join(case.volumes)}]")


def _data_block(name: str, text: str) -> str:
    # A case may be called </script>: in JSON, the sign is the same when it is escaped.
    safe = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{safe}</script>\n'
