"""Writers of tables and pages: Markdown, LaTeX and one self-contained HTML page; whatever is given is escaped.

A cell may have further lines: HTML and LaTeX set them below the first, Markdown goes on with a blank.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from itertools import zip_longest
from typing import Any

import pandas as pd

TEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--"}
TEX |= {"−": "$-$", "≈": r"$\approx$", "≠": r"$\neq$", "|": r"\textbar{}"}
TEX |= {"†": r"\dag{}", "×": r"$\times$", "≤": r"$\leq$", "≥": r"$\geq$", "ε": r"$\varepsilon$"}
TEX |= {"^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}"}
TEX |= {character: f"\\{character}" for character in "&%$#_{}"}

Notes = dict[str, Sequence[str]]  # what stands below a table, heading: sentences; without a heading: ''

STYLE = """
:root { color-scheme: light; --ink: #1d2530; --soft: #5b6675; --rule: #d9dee5; --tint: #f5f7fa; --accent: #004488; }
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: var(--ink);
  max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; background: #fff; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 3rem 0 .8rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
p.lead { color: var(--soft); margin: 0 0 1.4rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; background: var(--tint);
  padding: .9rem 1.1rem; border-radius: .5rem; margin: 0; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; } figure img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption, .notes { color: var(--soft); font-size: .88rem; } figcaption { margin-top: .6rem; }
p.notes { margin: 1rem 0 .2rem; font-weight: 600; }
ul.notes { padding-left: 1.1rem; margin: 0; } ul.notes li { margin: .25rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; min-width: 100%; font-variant-numeric: tabular-nums;
  border-top: 2px solid var(--ink); border-bottom: 2px solid var(--ink); }
th, td { text-align: left; padding: .4rem .9rem .4rem .3rem; vertical-align: top; }
.words td + td::first-line { font-weight: 600; }
td small { color: var(--soft); font-size: .82em; } td small b { color: #882255; font-size: 1.25em; line-height: 1; }
thead th { border-bottom: 1px solid var(--ink); } tbody tr:nth-child(even) { background: var(--tint); }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .3rem .9rem; font-size: .92rem; }
.bars div { display: flex; background: var(--tint); min-height: 1.1rem; align-self: center; }
.bars b { background: var(--accent); } .bars i { background: #9fb8d3; } .bars span { white-space: nowrap; }
sup { color: #882255; line-height: 0; }
details { margin-top: 3rem; } details table { font-size: .8rem; } summary { cursor: pointer; color: var(--accent); }
a { color: var(--accent); }
@media (min-width: 46.01rem) { .rows td:nth-child(n+4) { white-space: nowrap; } } /* values stay on their line */
@media (max-width: 46rem) { /* a phone: each row is a block of two lines, names and values; wide figures scroll */
  body { padding: 1.5rem .9rem 3rem; } dl { grid-template-columns: 1fr; } dt { margin-top: .4rem; }
  .rows table { font-size: .8rem; } .rows thead { border-bottom: 1px solid var(--ink); }
  .rows tr { display: grid; grid-template-columns: repeat(34, minmax(0, 1fr)); padding: .25rem 0; }
  .rows :is(th, td) { grid-column: span 10; padding: .1rem .2rem; white-space: normal; border: 0; }
  .rows :is(th, td):nth-child(2) { grid-column: span 15; overflow-wrap: anywhere; }
  .rows :is(th, td):nth-child(3) { grid-column: span 9; } .rows :is(th, td):last-child { grid-column: span 4; }
  .rows td:nth-child(-n+3) { font-weight: 600; } .rows td small { white-space: nowrap; }
  figure { overflow-x: auto; } figure img.wide { max-width: none; width: 44rem; }
}
"""


def markdown(title: str, text: pd.DataFrame, notes: Notes) -> str:
    """A data frame of text as a Markdown table between its title and its notes; values are not broken at their ±."""

    def line(cells: Iterable[Any]) -> str:
        texts = (escape(str(cell), quote=False).replace("|", "\\|").replace("\n", " ") for cell in cells)
        return "| " + " | ".join(re.sub(r"(?<=\d) (?=[±†])|(?<=±) (?=\d)", "\u00a0", text) for text in texts) + " |"

    body = [line(row) for row in text.itertuples(index=False)]
    parts = [f"**{title}**", "\n".join([line(text.columns), "|" + "---|" * len(text.columns), *body])]
    for heading, block in notes.items():
        parts += [f"{heading}:"] * bool(heading) + ["\n".join(f"- {escape(note, quote=False)}" for note in block)]
    return "\n\n".join(parts) + "\n"


def _tex(text: Any) -> str:
    return str(text).translate(str.maketrans(TEX))


def _tex_row(cells: Iterable[Any]) -> list[str]:
    """One line of the table for each line in the longest of these cells."""
    lines = zip_longest(*(str(cell).split("\n") for cell in cells), fillvalue="")
    return [" & ".join(map(_tex, line)) + r" \\" for line in lines]


def latex(title: str, text: pd.DataFrame, notes: Notes) -> str:
    """A data frame of text as a LaTeX table (package booktabs); 'Table 1.' is cut off, LaTeX numbers it."""
    body = [line for row in text.itertuples(index=False) for line in _tex_row(row)]
    size = r"\footnotesize" if len(text.columns) <= 7 else r"\scriptsize\setlength{\tabcolsep}{2pt}"
    return "\n".join(
        [
            r"\begin{table} % needs \usepackage{booktabs}",
            rf"\centering{size}",
            rf"\caption{{{_tex(title.partition('. ')[2])}}}",
            rf"\begin{{tabular}}{{{'l' * len(text.columns)}}}",
            r"\toprule",
            *_tex_row(text.columns),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par {_tex(note)}" for block in notes.values() for note in block),
            r"\end{table}",
            "",
        ]
    )


def _html_cell(cell: Any) -> str:
    first, *below = (escape(line) for line in str(cell).split("\n"))
    first = re.sub(r" (†\d+)$", r"&nbsp;<sup>\1</sup>", first)
    small = "".join(f"<br><small>{line.replace('≠', '<b>≠</b>')}</small>" for line in below)
    return f"<td>{first}{small}</td>"


def _html_row(cells: Iterable[Any]) -> str:
    """Cells as td elements; lines below the first are small, a '≠' in them and a dagger stand out."""
    return f"<tr>{''.join(map(_html_cell, cells))}</tr>"


def html_table(title: str, rows: pd.DataFrame, notes: Notes, kind: str = "rows") -> str:
    """A data frame of text as an HTML table with its heading and its notes; kind: 'rows' of values, or of 'words'."""
    head, *body = (_html_row(cells) for cells in [rows.columns, *rows.itertuples(index=False)])
    grid = f"<table><thead>{head.replace('td>', 'th>')}</thead>\n<tbody>{chr(10).join(body)}</tbody></table>"
    parts = [f"<h2>{escape(title)}</h2>", f'<div class="scroll {kind}">{grid}</div>']
    for heading, block in notes.items():
        listed = "".join(f"<li>{escape(note)}</li>" for note in block)
        parts.append(f'<p class="notes">{escape(heading)}</p><ul class="notes">{listed}</ul>')
    return "\n".join(parts)


def html_figure(title: str, png: bytes, caption: str) -> str:
    """A picture as part of the page, with its heading and caption."""
    wide = ' class="wide"' if png[16:20] > png[20:24] else ""  # width and height in the header, big-endian
    image = f'<img{wide} alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return f"<h2>{escape(title)}</h2>\n<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def html_bars(title: str, bars: list[tuple[str, float, float, str]], caption: str) -> str:
    """Horizontal bars (name, length, part of it, words), the longest over the whole width; the part is dark."""
    longest, rows = max((length for _, length, *_ in bars), default=0) or 1, []
    for name, length, part, words in bars:
        dark, light = (f"{100 * share / longest:.2f}%" for share in (part, length - part))
        bar = f'<div><b style="width:{dark}"></b><i style="width:{light}"></i></div>'
        rows.append(f"<span>{escape(name)}</span>{bar}<span>{escape(words)}</span>")
    grid = f'<div class="bars">{"".join(rows)}</div>'
    return f"<h2>{escape(title)}</h2>\n<figure>{grid}<figcaption>{escape(caption)}</figcaption></figure>"


def html_links(title: str, rows: list[tuple[str, str]]) -> str:
    """A folded list of (what, relative address)."""
    lines = (f'<tr><td>{escape(what)}</td><td><a href="{escape(to)}">{escape(to)}</a></td></tr>' for what, to in rows)
    return f"<details><summary>{escape(title)}</summary><table>{''.join(lines)}</table></details>"


def html_page(title: str, lead: str, facts: dict[str, str], sections: list[str]) -> str:
    """The whole page; `sections` are HTML already, everything else is text."""
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    width = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{width}<title>{escape(title)}</title><style>{STYLE}</style>'
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>', f"<dl>{terms}</dl>", *sections]
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
