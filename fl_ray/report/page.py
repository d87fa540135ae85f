"""The HTML report: one self-contained file, readable offline and on a phone."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

__all__ = ["data_image", "definitions", "escape", "figure", "page", "section", "table"]

_STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5c6b7a; --line: #dfe5ea; --tint: #f6f8fa; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; color: var(--ink); background: #fff;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.lead { color: var(--soft); margin: .2rem 0 1rem; }
figure { margin: .5rem 0; overflow-x: auto; } figure svg, figure img { max-width: 100%; height: auto; }
figcaption, .note { color: var(--soft); font-size: .87rem; }
.scroll { overflow-x: auto; width: max-content; min-width: 100%; max-width: calc(100vw - 3rem);
       position: relative; left: 50%; transform: translateX(-50%); } /* a wide table has the window's width */
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
td:nth-child(2):last-child { white-space: normal; } /* a value may be a sentence */
th:first-child, td:first-child { text-align: left; } thead th { background: var(--tint); }
@media (max-width: 40rem) { figure svg, figure img { max-width: none; } /* as drawn, and scrolled */
       th:first-child, td:first-child { white-space: normal; min-width: 7rem; } }
details { margin: .5rem 0; } pre { background: var(--tint); padding: .7rem; overflow-x: auto; font-size: .82rem; }
"""


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """The whole document; ``sections`` are HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n'
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *content: str) -> str:
    """A heading and what stands below it."""
    return f"<section>\n<h2>{html.escape(title)}</h2>\n" + "\n".join(content) + "\n</section>"


def escape(text: str) -> str:
    """Text as a page has it."""
    return html.escape(text)


def figure(content: str, caption: str) -> str:
    """An SVG or image element with a caption."""
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


def data_image(png: bytes, alt: str) -> str:
    """A PNG inside the page."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways where it is too wide."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def definitions(title: str, content: str) -> str:
    """Folded plain text."""
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(content)}</pre></details>"
