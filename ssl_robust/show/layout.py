"""Tables as Markdown and as LaTeX; whatever is given is escaped.

A cell may have further lines: LaTeX sets them below the first, Markdown goes on with a blank.
"""

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
