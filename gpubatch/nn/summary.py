"""A network as a table: its layers, what they give, and their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDEST = 34  # characters of a layer, so that the table fits 80 columns
HEADER = ("", "layer", "output", "parameters", "bytes")


@dataclass(frozen=True)
class LayerSummary:
    """A layer: its text, the width of its output, how many numbers it trains, and their bytes with its buffers'."""

    layer: str
    outputs: int
    parameters: int
    bytes: int


@dataclass(frozen=True, repr=False)
class Summary:
    """What :meth:`gpubatch.Network.summary` returns; ``print`` it, or show it in a notebook.

    layers: the layers, in their order
    words: inputs, loss, dtype and device, in a line
    parameters: how many numbers are trained
    bytes: the bytes of parameters and buffers; gradients take as many again as the parameters
    """

    layers: tuple[LayerSummary, ...]
    words: str
    parameters: int
    bytes: int

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, row by row; the last row has the totals."""
        found = [
            (f"{i}", _cut(row.layer), f"(n, {row.outputs:,})", f"{row.parameters:,}", f"{row.bytes:,}")
            for i, row in enumerate(self.layers, 1)
        ]
        return [*found, ("", "in all", "", f"{self.parameters:,}", f"{self.bytes:,}")]

    def __str__(self) -> str:
        rows = [HEADER, *self.rows()]
        widths = [max(len(row[k]) for row in rows) for k in range(len(HEADER))]
        lines = [_line(row, widths) for row in rows]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], self.words])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def row(tag: str, cells: Sequence[str]) -> str:
            aligned = [f'<{tag} style="text-align: {"left" if k < 2 else "right"}">' for k in range(len(cells))]
            return f"<tr>{''.join(f'{a}{escape(c)}</{tag}>' for a, c in zip(aligned, cells, strict=True))}</tr>"

        *rows, total = self.rows()
        body = "".join(row("td", cells) for cells in rows)
        return f"<table>{row('th', HEADER)}{body}{row('th', total)}</table><p>{escape(self.words)}</p>"


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Texts at the left, numbers at the right."""
    padded = [c.ljust(w) if k < 2 else c.rjust(w) for k, (c, w) in enumerate(zip(cells, widths, strict=True))]
    return "  ".join(padded).rstrip()
