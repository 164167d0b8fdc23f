"""A picture as a file, which tells what is written in it."""

from __future__ import annotations

import hashlib
import json
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIGEST = "Digest"  # the key of a PNG's text


def png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as the bytes of a PNG file, of so many pixels an inch, with its digest."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={DIGEST: digest(figure), "Software": None})
    return buffer.getvalue()


def digest(figure: Figure) -> str:
    """SHA-256 of all texts but the numbers along axes: a file with another one is of another picture.

    Titles, notes, labels and the cells of tables say what is drawn, and are the same on every machine.
    """
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    along = {id(text) for axis in figure.findobj(Axis) for text in axis.findobj(Text) if text is not axis.label}  # type: ignore[attr-defined]
    texts = [text.get_text() for text in figure.findobj(Text) if id(text) not in along]  # type: ignore[attr-defined]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
