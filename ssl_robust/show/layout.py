"""Tables of text as Markdown and as LaTeX, whatever is given escaped; a cell may have several lines."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import pandas as pd

TEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--"}
TEX |= {"−": "$-$", "≈": r"$\approx$", "≠": r"$\neq$", "|": r"\textbar{}"}
TEX |= {"†": r"\dag{}", "×": r"$\times$", "≤": r"$\leq$", "≥": r"$\geq$", "ε": r"$\varepsilon$"}
TEX |= {"^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}"}
TEX |= {character: f"\\{character}" for character in "&%$#_{}"}

Notes = dict[str, Sequence[str]]  # what stands below a table, heading: sentences; without a heading: ''


def _line(cells: Iterable[Any]) -> str:
    """One line of a Markdown table, its values not broken at their ± and †."""
    texts = (escape(str(cell), quote=False).replace("|", "\\|").replace("\n", " ") for cell in cells)
    return "| " + re.sub(r"(?<=\d) (?=[±†])|(?<=±) (?=\d)", "\u00a0", " | ".join(texts)) + " |"


def markdown(title: str, text: pd.DataFrame, notes: Notes) -> str:
    """A data frame of text as a Markdown table between its title and its notes."""
    body = [_line(row) for row in text.itertuples(index=False)]
    parts = [f"**{title}**", "\n".join([_line(text.columns), "|" + "---|" * len(text.columns), *body])]
    for heading, block in notes.items():
        parts += [f"{heading}:"] * bool(heading) + ["\n".join(f"- {escape(note, quote=False)}" for note in block)]
    return "\n\n".join(parts) + "\n"


def _tex(text: Any) -> str:
    first, *more = str(text).translate(str.maketrans(TEX)).split("\n")
    return r"\shortstack[l]{" + r"\\".join([first, *more]) + "}" if more else first


def latex(title: str, text: pd.DataFrame, notes: Notes) -> str:
    """A data frame of text as a LaTeX table (package booktabs); 'Table 1.' is cut off, LaTeX numbers it."""
    size = r"\footnotesize" if len(text.columns) <= 7 else r"\scriptsize\setlength{\tabcolsep}{2pt}"
    styled = text.style.hide(axis="index").format(_tex).format_index(_tex, axis="columns")
    above = [r"\begin{table} % needs \usepackage{booktabs}", rf"\centering{size}"]
    above += [rf"\caption{{{_tex(title.partition('. ')[2])}}}"]
    below = [rf"\par {_tex(note)}" for block in notes.values() for note in block]
    table = styled.to_latex(hrules=True, column_format="l" * len(text.columns))
    return "\n".join([*above, table.rstrip("\n"), *below, r"\end{table}", ""])
