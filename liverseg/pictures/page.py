"""Self-contained HTML: tables, curves and a slice viewer; no server, no library, opens from a file.

Up to ``MAX_CASES`` cases are one file. More are an index, and beside it a folder with a file per case: a page of a
hundred cases would take a browser's memory, and a second to open where each of these takes none.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from data_cache.files import replacing
from data_cache.outputs import author, html_mark, require_replaceable
from data_cache.text import pluralise

MAX_CASES = 20  # in one file: 28 MB at most
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
        content: Gives the JSON text of what ``slices`` makes of a case; called once, when the page is written, so that
            one case at a time is in memory.
    """

    name: str
    note: str
    cells: tuple[float | str | None, ...]
    content: Callable[[], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a page shows, from top to bottom.

    Attributes:
        sections: HTML between the title and the table of cases.
        order: What the order of the cases means, said above their table.
        columns: Headers of the cells, without the case's name.
        digits: Shown of each column's numbers.
        cases: In the order they are to be looked at.
    """

    title: str
    subtitle: str
    sections: tuple[str, ...]
    order: str
    columns: tuple[str, ...]
    digits: tuple[int, ...]
    cases: Sequence[PageCase]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFiles:
    """What was written.

    Attributes:
        path: The page to open.
        case_bytes: Sizes of the files of cases beside an index; empty where all is in one file.
    """

    path: Path
    n_bytes: int
    case_bytes: tuple[int, ...] = ()

    def line(self) -> str:
        """Where the page is, and how large it is."""
        if not self.case_bytes:
            return f"{self.path} ({_mb(self.n_bytes)})"
        folder = case_folder(self.path)
        return (
            f"{self.path} ({_mb(self.n_bytes)}), an index of {pluralise(len(self.case_bytes), 'file')} in {folder} "
            f"({_mb(sum(self.case_bytes))}, the largest {_mb(max(self.case_bytes))})"
        )


def write_page(page: Page, path: Path, *, max_cases: int = MAX_CASES, command: str = "report") -> PageFiles:
    """Write the page, each file whole or not at all, one case after another.

    Args:
        page: What to show.
        path: The file to open; with more than ``max_cases`` cases an index.
        max_cases: In one file.
        command: Signs the page.

    Raises:
        OutputError: The page, or the file of a case, exists and was not written by the same command.
    """
    require_replaceable(path, html_mark(command), command=command)
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(page.cases) <= max_cases:
        blocks = _data_blocks(page.cases, nav={})
        return PageFiles(
            path=path, n_bytes=_write(path, page, [*page.sections, _case_table(page)], blocks, command)
        )
    names = _file_names(page.cases)
    folder = case_folder(path)
    for name in names:
        require_replaceable(folder / name, html_mark(command), command=command)
    folder.mkdir(exist_ok=True)
    sizes = tuple(
        _write_case(page, index, folder, names, command, up=path.name) for index in range(len(names))
    )
    links = [f"{folder.name}/{name}" for name in names]
    body = [*page.sections, _case_table(page, links), _stated(sizes)]
    return PageFiles(path=path, n_bytes=_write(path, page, body, None, command), case_bytes=sizes)


def case_folder(path: Path) -> Path:
    """Where the files of cases are, beside their index."""
    return path.with_name(f"{path.stem}_cases")


def html_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table of text; the first column is a heading."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headers)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# ---- files


def _write(path: Path, page: Page, body: Sequence[str], blocks: Iterator[str] | None, command: str) -> int:
    """Fill in the template; without ``blocks`` there is no viewer. Returns the size of the file."""
    assets = files("liverseg.pictures") / "assets"
    read = {name: (assets / name).read_text(encoding="utf-8") for name in ("page.html", "viewer.html")}
    before, after = read["page.html"].split("{{data}}")
    filling = {
        "generator": author(command),
        "title": html.escape(page.title),
        "subtitle": html.escape(page.subtitle),
        "css": (assets / "page.css").read_text(encoding="utf-8"),
        "body": "\n".join(body),
        "viewer": "" if blocks is None else read["viewer.html"],
        "table_js": (assets / "table.js").read_text(encoding="utf-8"),
        "viewer_js": "" if blocks is None else (assets / "viewer.js").read_text(encoding="utf-8"),
    }
    with replacing(path) as file:
        file.write(_filled(before, filling).encode())
        for block in blocks or ():
            file.write(block.encode())
        file.write(_filled(after, filling).encode())
    return path.stat().st_size


def _write_case(page: Page, index: int, folder: Path, names: Sequence[str], command: str, *, up: str) -> int:
    n = len(names)
    neighbours = {"previous": names[(index - 1) % n], "next": names[(index + 1) % n], "index": f"../{up}"}
    alone = Page(
        title=page.cases[index].name,
        subtitle=page.title,
        sections=(),
        order="",
        columns=page.columns,
        digits=page.digits,
        cases=[page.cases[index]],
    )
    blocks = _data_blocks(alone.cases, nav=neighbours)
    back = f'<p><a href="../{html.escape(up)}">all {n} cases</a></p>'
    return _write(folder / names[index], alone, [back, _case_table(alone)], blocks, command)


def _file_names(cases: Sequence[PageCase]) -> list[str]:
    """A case's own name where that is harmless, or else its number."""
    return [
        f"{case.name}.html" if re.fullmatch(r"[\w-][\w.-]*", case.name, re.ASCII) else f"case_{index}.html"
        for index, case in enumerate(cases)
    ]


def _stated(sizes: Sequence[int]) -> str:
    return (
        f'<p class="muted">{pluralise(len(sizes), "file")}, {_mb(sum(sizes))} together, the largest '
        f"{_mb(max(sizes))}: the index needs the folder beside it.</p>"
    )


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


def _filled(template: str, filling: Mapping[str, str]) -> str:
    # Split and not replaced one after another: a title may hold {{css}}.
    first, *rest = template.split("{{")
    parts = [first]
    for piece in rest:
        name, tail = piece.split("}}", 1)
        parts += [filling[name], tail]
    return "".join(parts)


# ---- the table


def _case_table(page: Page, links: Sequence[str] | None = None) -> str:
    headers = ("case", *page.columns)
    head = "".join(f'<th><button type="button">{html.escape(h)}</button></th>' for h in headers)
    rows = "\n".join(_case_row(page, index, links) for index in range(len(page.cases)))
    order = f'<p class="muted">{html.escape(page.order)}</p>\n' if page.order else ""
    return (
        f'<h2>Cases</h2>\n{order}<div class="scroll"><table id="table"><thead><tr>{head}</tr></thead>'
        f'<tbody id="rows">\n{rows}\n</tbody></table></div>'
    )


def _case_row(page: Page, index: int, links: Sequence[str] | None) -> str:
    case = page.cases[index]
    name = html.escape(case.name)
    cells = "".join(_cell(cell, digits) for cell, digits in zip(case.cells, page.digits, strict=True))
    if links is None:
        opener = f'<button type="button" class="open" data-index="{index}">{name}</button>'
    else:
        opener = f'<a class="open" href="{html.escape(links[index])}">{name}</a>'
    return f'<tr data-index="{index}"><td data-value="{name}">{opener}</td>{cells}</tr>'


def _cell(cell: float | str | None, digits: int) -> str:
    if cell is None:
        return '<td data-value="">–</td>'
    if isinstance(cell, str):
        return f"<td>{html.escape(cell)}</td>"
    return f'<td data-value="{cell!r}">{cell:.{digits}f}</td>'


# ---- the viewer's data


def _data_blocks(cases: Sequence[PageCase], *, nav: Mapping[str, str]) -> Iterator[str]:
    yield _data_block("nav", json.dumps(nav))
    yield _data_block("cases", json.dumps([{"name": case.name, "note": case.note} for case in cases]))
    yield _data_block("windows-hu", json.dumps(WINDOWS))
    for index, case in enumerate(cases):
        yield _data_block(f"case-{index}", case.content())


def _data_block(name: str, text: str) -> str:
    # A case may be called </script>: in JSON, the sign is the same when it is escaped.
    safe = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{safe}</script>\n'
