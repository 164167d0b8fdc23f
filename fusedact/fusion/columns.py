"""Aligned columns of text in lines of a given length."""

import re
from collections.abc import Container, Iterator, Sequence

NARROWEST = 16  # characters of a column of text, however short the lines
GAP = "  "


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], numeric: Container[int], width: int, indent: str = GAP
) -> Iterator[str]:
    """Aligned columns under `heads` if any; those of text give way, the widest first, until a line fits."""
    lines = [heads, *rows] if heads else rows
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    text = [at for at in range(len(columns)) if at not in numeric]
    while len(indent) + sum(widths) + len(GAP) * (len(widths) - 1) > width:
        widest = max(text, key=widths.__getitem__)
        if widths[widest] <= NARROWEST:
            break
        widths[widest] -= 1
    for row in lines:
        cells = [_wrapped(cell, size) for cell, size in zip(row, widths, strict=True)]
        for line in range(max(map(len, cells))):
            parts = [
                f"{cell[line] if line < len(cell) else '':{'<' if at in text else '>'}{size}}"
                for at, (cell, size) in enumerate(zip(cells, widths, strict=True))
            ]
            yield (indent + GAP.join(parts)).rstrip()


def _wrapped(cell: str, width: int) -> list[str]:
    """Lines that end at a space or a dot; what is longer than a line loses its middle."""
    lines = [""]
    for piece in re.findall(r"\{\d+\.\.\d+\}\.?|[^\s.{]+[.\s]?|.", cell):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    tail = (width - 1) // 2
    lines = [line.rstrip() for line in lines]
    return [line if len(line) <= width else f"{line[: width - 1 - tail]}…{line[len(line) - tail :]}" for line in lines]
