"""The charts of docs/images: what each is drawn from, and whether the file there was drawn from it.

A chart's file carries a digest of all that it shows, so that nobody needs to compare pixels.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from bench.memory import LOSSES, units
from bench.reporting import records
from bench.reporting.suite_tables import suite_source
from bench.reporting.tables import gpu_source
from bench.reporting.timed import WHOLE, Timed, of_gpu, of_suites
from fusedact.plotting import charts

DIGEST = "Digest"  # the key of a PNG's text
DPI = 120  # of 10 inches: half as many pixels again as a README shows
FASTER = "stock's time over the contender's: right of 1 is faster"
PHASES = {"no_grad": "value alone", "both": "forward with backward"}
PANELS = PHASES | dict.fromkeys(("forward", "no_grad"), "forward, or value alone")


@dataclass(frozen=True)
class Chart:
    """A picture: draw(**shown), under its name."""

    name: str
    draw: Callable[..., Any]
    shown: dict[str, Any]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.name, self.shown, DPI], sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.draw(**self.shown).savefig(folder / self.name, dpi=DPI, metadata={DIGEST: self.digest, "Software": None})

    def current(self, folder: Path) -> bool:
        return written(folder / self.name) == self.digest


def written(path: Path) -> str | None:
    """The digest that a chart's file carries; None where there is no such file or none in it."""
    try:
        with Image.open(path) as image:
            return image.info.get(DIGEST)
    except (FileNotFoundError, UnidentifiedImageError):
        return None


def of_records(results: Path) -> list[Chart]:
    """Every chart that the records there can give."""
    return [*_of_cpu(results), *_of_gpu(results)]


def _of_cpu(results: Path) -> Iterator[Chart]:
    if found := records.suites(results):
        _, record = found
        source = suite_source(record).replace("`", "")
        note = (
            "Dots are medians of rounds' ratios, whiskers their 20 and 80 % points. On a CPU fused layers run stock's "
            "own operations: their aim is 1 within stock's noise against itself, which is grey. "
        )
        yield from _common("cpu", list(of_suites(record)), record["machine_info"]["ceilings"], note, source)
    if found := records.memory(results):
        yield _formulas(*found)


def _of_gpu(results: Path) -> Iterator[Chart]:
    if found := records.newest(results):
        _, record = found
        timed, source = list(of_gpu(record)), gpu_source(record).replace("`", "")
        ceilings = record["sections"].get("ceilings", {}).get("results", {})
        note = (
            "Dots are ratios of medians, whiskers the ratios of the contender's 20 and 80 % points. Stock's noise "
            "against itself is grey. "
        )
        yield from _common("gpu", timed, ceilings, note, source)
        held = [
            charts.Held(each.op, each.label, each.contender, each.memory / 2**20)
            for each in timed
            if each.phase == "both" and each.memory is not None
        ]
        if held:
            title = "Memory of forward with backward at its peak: to the left is less"
            yield Chart("gpu-memory.png", charts.memory, {"held": held, "title": title, "caption": source})


def _common(device: str, timed: list[Timed], ceilings: dict, note: str, source: str) -> Iterator[Chart]:
    """Speed-ups of ops and of trainers, roofline and accuracy."""
    for name, title, trainers in (
        ("speedup", f"Ops, {FASTER}", False),
        ("trainers", f"Trainers, {FASTER}", True),
    ):
        bars = [
            charts.Speedup(
                each.op,
                each.label,
                PANELS.get(each.phase, each.phase),
                *(each.contender, each.ratio, each.low, each.high, each.noise),
            )
            for each in timed
            if each.contender != "stock" and each.of_trainer == trainers
        ]
        if bars:
            shown = {"bars": bars, "title": title, "caption": note + source}
            yield Chart(f"{device}-{name}.png", charts.speedups, shown)
    yield from _roofline(device, timed, ceilings, source)
    yield from _accuracy(device, timed, source)


def _roofline(device: str, timed: list[Timed], ceilings: dict, source: str) -> Iterator[Chart]:
    kernels = [
        charts.Kernel(each.case, PHASES.get(each.phase, each.phase), each.bytes, each.flops, each.micros)
        for each in timed
        if each.contender == "fusedact" and each.phase not in WHOLE and each.bytes and each.flops
    ]
    tflops = {name.partition(",")[0]: rate for name, rate in ceilings.items() if name.endswith("TFLOP/s")}
    if not kernels or not tflops or "copy, GB/s" not in ceilings:
        return
    shown = {"kernels": kernels, "gbps": ceilings["copy, GB/s"], "tflops": tflops}
    title = "fusedact on the roofline: nearer to the lines is better"
    note = (
        "Lines are ceilings measured here: a copy's, and matrix products' by kind. A point above the copy's line has "
        "its tensors in a cache; one without a number has no room for it. "
    )
    yield Chart(f"{device}-roofline.png", charts.roofline, shown | {"title": title, "caption": note + source})


def _accuracy(device: str, timed: list[Timed], source: str) -> Iterator[Chart]:
    """A case's errors are the same in each of its phases: one is taken."""
    by_case: dict[str, dict[str, Timed]] = {}
    for each in timed:
        if each.errors:
            by_case.setdefault(each.case, {})[each.contender] = each
    errors = [
        charts.Errors(case, found["fusedact"].dtype, stock, ours)
        for case, found in by_case.items()
        if {"stock", "fusedact"} <= set(found)
        for stock, ours in zip(found["stock"].errors, found["fusedact"].errors, strict=True)
    ]
    if errors:
        title = "Error against float64: on or below the line is within the contract"
        note = (
            "Relative errors of values and gradients, of which a single number may err by one rounding more. Named are "
            "those nearest to the line, or beyond. "
        )
        shown = {"errors": errors, "title": title, "caption": note + source}
        yield Chart(f"{device}-accuracy.png", charts.accuracy, shown)


def _formulas(path: Path, record: dict) -> Chart:
    """What losses hold by bench/memory.py's formulas, and what heads held on a CPU by its record."""
    held = [
        charts.Held(
            "by formula",
            f"{loss.case.op} {'x'.join(map(str, loss.case.shape))} {loss.case.dtype}",
            way,
            each.peak.bytes(units(loss.case)) / 2**20,
        )
        for loss in LOSSES
        for way, each in loss.held.items()
    ]
    names = {"`F.linear`, `F.cross_entropy`": "stock", "`F.linear_cross_entropy`, its chunks": "torch's chunks"}
    head = f"linear_cross_entropy {'x'.join(map(str, record['shape']))} float32"
    held += [
        charts.Held("measured: resident on a CPU", head, names.get(name, name), each["bytes"] / 2**20)
        for name, each in record["heads"].items()
        if name in names or name == "fusedact"
    ]
    source = (
        "Formulas: bench/memory.py, counted in tests/test_memory.py as far as a CPU can. "
        f"Measured: {record['machine']}, {record['date']}, commit {record['commit']}, by python -m bench.memory, "
        f"record bench/results/{path.name}. Beyond inputs, gradients included."
    )
    title = "Memory of a loss with its gradients at the peak: to the left is less"
    return Chart("cpu-memory.png", charts.memory, {"held": held, "title": title, "caption": source})
