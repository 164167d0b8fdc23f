"""What a layer keeps for its backward: `TRITON_INTERPRET=1 python -m bench.saved` writes the table of docs/measured.md.

Counted with saved-tensor hooks on linear, activation, linear: the distinct memory between the two products, in bytes
for each of its elements. The kernels are interpreted.
"""

from pathlib import Path

import torch

import fusedact
from bench.report import between
from fusedact.activations import TABLE, Activation

PAGE = Path(__file__).parents[1] / "docs" / "measured.md"
OPEN, CLOSE = "<!-- saved -->", "<!-- /saved -->"
ROWS, WIDTH = 4, 8


def kept(nn, activation: Activation, dtype: torch.dtype) -> int:
    """Bytes for each element between two linear layers, of nn's modules."""
    model = nn.Sequential(nn.Linear(3, WIDTH), activation.build(), nn.Linear(WIDTH, 2)).to(dtype)
    x = torch.randn(ROWS, 3, dtype=dtype)
    own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    found: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and t.numel() == ROWS * WIDTH:
            found[storage.data_ptr()] = storage.nbytes()
        held.append(t)  # or its memory would be given to the next
        return t

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x)
    return sum(found.values()) // (ROWS * WIDTH)


def table() -> str:
    lines = [
        "| activation | keeps | float32: stock | float32 | bfloat16: stock | bfloat16 |",
        "|---|---|---|---|---|---|",
    ]
    for activation in TABLE:
        if activation.module is None:
            continue
        counts = []
        for dtype in (torch.float32, torch.bfloat16):
            counts.append(kept(torch.nn, activation, dtype))
            with fusedact.use_backend("triton"):
                counts.append(kept(fusedact.nn, activation, dtype))
        from_output = [activation.from_output(d, *activation.default_values) for d in (torch.float32, torch.bfloat16)]
        which = "y" if all(from_output) else "y, in 16 bits z" if from_output[0] else "z"
        lines.append(f"| `{activation.name}` | {which} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def rendered(page: str) -> str:
    return between(page, OPEN, CLOSE, table())


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
