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
    return str(text).translate(str.maketrans(TEX))


def _tex_lines(row: Sequence[Any], values: Sequence[bool]) -> list[str]:
    """A row of a table, and one for each further line of its cells; a value and its mark are cells of their own."""
    cells, found = [str(cell).split("\n") for cell in row], []
    for i in range(max(map(len, cells))):
        line = []
        for cell, is_value in zip(cells, values, strict=True):
            text, _, mark = (cell[i] if i < len(cell) else "").partition(" †")
            line += [_tex(text), rf"\,\textsuperscript{{\dag{mark}}}" * bool(mark)] if is_value else [_tex(text)]
        found.append(" & ".join(line) + r" \\")
    return found


def latex(title: str, label: str, text: pd.DataFrame) -> str:
    """A data frame of text as a LaTeX table (package booktabs) to paste or to \\input; LaTeX itself numbers 'Table 1.'.

    Values ('0.84 ± 0.05 †1') are aligned, their marks stand behind them. What all headings of values have in common
    behind a comma, the metric, goes into the caption.
    """
    values = [text[name].astype(str).str.contains("±|not run").any() for name in text.columns]
    metric = {name.partition(", ")[2] for name in text.columns[values]}
    shared = f", {metric.pop()}" if len(metric) == 1 and metric != {""} else ""
    heads = [_tex(name.removesuffix(shared) if shared else name) for name in text.columns]
    above = [rf"\multicolumn{{2}}{{c}}{{{h}}}" if value else h for h, value in zip(heads, values, strict=True)]
    form = ["r@{}l" if value else "r" if head == "n" else "l" for head, value in zip(heads, values, strict=True)]
    size = "footnotesize" if len(heads) <= 7 else "scriptsize"  # as wide as the text of an article
    return "\n".join([
        r"\begin{table} % needs \usepackage{booktabs}", rf"\centering\{size}\setlength{{\tabcolsep}}{{3pt}}",
        rf"\caption{{{_tex(title.partition('. ')[2] + shared)}}}", rf"\label{{{label}}}",
        rf"\begin{{tabular}}{{{''.join(form)}}}", r"\toprule", " & ".join(above) + r" \\", r"\midrule",
        *(line for row in text.itertuples(index=False) for line in _tex_lines(row, values)),
        r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip


def latex_notes(notes: Notes) -> str:
    """What stands below a table, a paragraph of LaTeX for each heading."""
    blocks = ((heading, " ".join(map(_tex, block)).replace("/", r"\slash{}")) for heading, block in notes.items())
    return (
        r"\sloppy"
        + "\n"
        + "".join(rf"\paragraph{{{_tex(heading)}}} {sentences}" + "\n\n" for heading, sentences in blocks)
    )
