"""fusedact.distributed.scaling against a CPU: a head's step in 2 and 4 processes of gloo on loopback.

python -m bench.scale [--rounds N] [--smoke]     measures, writes the record and into docs/scale.md what it says
python -m bench.scale --loaded                   the same beside other work, which is refused otherwise
python -m bench.scale --page                     puts the record there again
python -m bench.scale --picture                  draws docs/images/scale.png, which needs no measurement

Each number of processes is calibrated by itself, with all its processes at work, so that cores they share are in the
rates: collectives of several sizes for the link, heads of one process each for the chip. Heads of several processes
are then predicted at shapes that no calibration used, in some of which most of the step is the network's.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from math import exp, inf, log
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track

from bench.report import between
from bench.reporting.pictures import Chart
from bench.scale_worker import MOSTLY_SENT, WAYS, Shape
from fusedact.distributed import scaling
from fusedact.distributed.scaling import Chip, Collective, Cost, Group, Link
from fusedact.plotting.scaling import Step
from fusedact.plotting.scaling import scaling as drawn
from fusedact.profiling.machine import processor

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "bench" / "results" / "scale-cpu.json"
PAGE = ROOT / "docs" / "scale.md"
OPEN, CLOSE = "<!-- scale -->", "<!-- /scale -->"
PICTURE = ROOT / "docs" / "images" / "scale.png"
WORLDS = (2, 4)
ROUNDS = 15
RUN = {"itemsize": 4, "overlap": False}
FREE = Link(inf, 0.0)
SMALL = 1e-4  # of a logarithm, to find slopes by
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # memory, as a GPU's allocator keeps it


# Of all of them


def measure(rounds: int, smoke: bool) -> dict:
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "kind": "scale",
        "date": date.today().isoformat(),
        "commit": described.stdout.strip(),
        "machine": f"{processor()}, {platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # of whatever else ran
        "rounds": rounds,
        "worlds": {str(world): _started(world, rounds, smoke) for world in track(WORLDS, "processes")},
    }


def _started(world: int, rounds: int, smoke: bool) -> list:
    """[kind, case, median seconds] of each call."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | KEPT
    hidden = ("TRITON_INTERPRET", "FUSEDACT_BACKEND")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "samples.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        options = [str(out), "--rounds", str(rounds), *(["--smoke"] if smoke else [])]
        subprocess.run(
            [*command, "-m", "bench.scale_worker", *options],
            cwd=ROOT,
            env={name: value for name, value in environment.items() if name not in hidden},
            check=True,
        )
        samples = json.loads(out.read_text())
    return [[kind, case, statistics.median(seconds)] for kind, case, seconds in samples]


# Predicted


def fitted(predict: Callable[..., Sequence[float]], seconds: Sequence[float], *starts: Sequence[float]) -> list[float]:
    """The parameters, all above 0, of which the logarithms of predictions over seconds have the least squares.

    By Levenberg and Marquardt's steps in the parameters' logarithms, from each of the starts: at one of them a maximum
    may hide a parameter.
    """
    truth = torch.tensor(seconds, dtype=torch.float64).log()

    def errors(logs: torch.Tensor) -> torch.Tensor:
        return torch.tensor(predict(*logs.exp().tolist()), dtype=torch.float64).log() - truth

    def descended(start: Sequence[float]) -> tuple[float, list[float]]:
        best = torch.tensor(start, dtype=torch.float64).log()
        found, damping, every = errors(best), 1.0, torch.eye(len(start), dtype=torch.float64)
        while 1e-6 < damping < 1e6:
            slopes = torch.stack([(errors(best + SMALL * each) - found) / SMALL for each in every])
            tried = best - torch.linalg.solve(slopes @ slopes.T + damping * every, slopes @ found).clamp(-1, 1)
            then = errors(tried)
            better = then.square().sum() < found.square().sum()
            best, found, damping = (tried, then, damping / 3) if better else (best, found, damping * 5)
        return float(found.square().sum()), best.exp().tolist()

    return min(map(descended, starts))[1]


def link_of(calls: list, world: int) -> Link:
    """What the collectives alone say."""
    sent = [(Collective(*case, world), seconds) for kind, case, seconds in calls if kind == "sent"]

    def predict(*rates: float) -> list[float]:
        link = _link(*rates)
        return [each.seconds(Group(world, world, link, link)) for each, _ in sent]

    return _link(*fitted(predict, [seconds for _, seconds in sent], (1e9, 1e-4, 1e-4)))


def _link(bytes_per_second: float, latency: float, start: float) -> Link:
    return Link(bytes_per_second, latency, "gloo on loopback", start)


def chip_of(calls: list, way: str) -> Chip:
    """What heads of one process each say, all processes at once: as slices, of which a link that is free has others."""
    heads = [(Shape(*case), seconds) for kind, case, seconds in calls if kind == f"alone {way}"]
    of = 2 if way == "sharded" else 1

    def predict(*rates: float) -> list[float]:
        given = {"link": FREE, "chip": _chip(*rates), **RUN}
        shapes = (head._replace(classes=of * head.classes) for head, _ in heads)
        return [scaling.head_step(**shape._asdict(), gpus=of, way=way, **given).total for shape in shapes]

    starts = [(5e10, copied, 2e9, 3e-4) for copied in (1e9, 3e9, 1e10)]
    return _chip(*fitted(predict, [seconds for _, seconds in heads], *starts))


def _chip(flops: float, copied: float, passed: float, chunk_seconds: float) -> Chip:
    return Chip(flops, copied, "CPU", pass_bytes_per_second=passed, chunk_seconds=chunk_seconds)


class Fits(NamedTuple):
    """Of so many processes."""

    world: int
    link: Link
    chips: dict[str, Chip]

    @classmethod
    def of(cls, calls: list, world: int) -> "Fits":
        return cls(world, link_of(calls, world), {way: chip_of(calls, way) for way in WAYS})

    def predicted(self, way: str, shape: Shape) -> Cost:
        """All in turn: where every core computes, nothing is left that could send meanwhile."""
        given = {"link": self.link, "chip": self.chips[way], "per_node": self.world, **RUN}
        return scaling.head_step(**shape._asdict(), gpus=self.world, way=way, **given)


class Compared(NamedTuple):
    """A head of several processes: as predicted, and the seconds measured."""

    fits: Fits
    way: str
    shape: Shape
    cost: Cost
    seconds: float

    @property
    def ratio(self) -> float:
        return self.cost.total / self.seconds

    @property
    def mostly_sent(self) -> bool:
        return self.shape in MOSTLY_SENT[self.way]

    @property
    def sent_share(self) -> float:
        """Of the seconds predicted, those of the network."""
        return self.cost.exposed / self.cost.total


def compared(record: dict, fits: Sequence[Fits]) -> list[Compared]:
    return [
        Compared(each, way, Shape(*case), each.predicted(way, Shape(*case)), seconds)
        for each in fits
        for way, case, seconds in record["worlds"][str(each.world)]
        if way in WAYS
    ]


def all_fits(record: dict) -> list[Fits]:
    return [Fits.of(calls, int(world)) for world, calls in record["worlds"].items()]


def shown(record: dict, fits: Sequence[Fits]) -> str:
    """Rates and predictions for docs/scale.md."""
    link_heads = ("processes", "link, MB/s", "a step, µs", "a call, µs", *(f"{way}: GFLOP/s" for way in WAYS))
    heads = ("processes", "way", "tokens x hidden x classes", "sent, MB", "predicted, ms", "of that sending, %")
    heads += ("measured, ms", "ratio")
    where = f"{record['machine']}, torch {record['torch']}, {record['date']}, commit {record['commit']}"
    all_of_them = compared(record, fits)
    ratios = [each.ratio for each in all_of_them]
    farthest = max(abs(log(ratio)) for ratio in ratios)
    return (
        f"{where}: record `bench/results/{RECORD.name}`,\nby `python -m bench.scale`. Medians of {record['rounds']} "
        f"rounds, each as its slowest process;\nas it began {_said(record)}.\nPredicted over measured: median "
        f"{statistics.median(ratios):.2f}, the farthest from 1 by a factor of {exp(farthest):.2f}.\n\n"
        f"{markdown([link_heads, *map(_rates, fits)])}\n\n{markdown([heads, *map(_prediction, all_of_them)])}"
    )


def _said(record: dict) -> str:
    beside = "other work took all cores" if record["load"] > record["cores"] else "cores were free"
    return f"{beside}, at a load average of {record['load']} on {record['cores']}"


def _rates(fits: Fits) -> tuple[str, ...]:
    link = fits.link
    figures = link.bytes_per_second / 1e6, 1e6 * link.latency_seconds, 1e6 * link.start_seconds
    flops = (fits.chips[way].flops / 1e9 for way in WAYS)
    return str(fits.world), *(f"{figure:,.0f}" for figure in figures), *(f"{rate:.1f}" for rate in flops)


def _prediction(each: Compared) -> tuple[str, ...]:
    cost = each.cost
    figures = (
        f"{1e3 * cost.total:.1f}",
        f"{100 * each.sent_share:.0f}",
        f"{1e3 * each.seconds:.1f}",
        f"{each.ratio:.2f}",
    )
    shape = " x ".join(f"{n:,}" for n in each.shape[:3])
    return str(each.fits.world), each.way, shape, f"{cost.sent / 1e6:.2f}", *figures


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rows = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def rendered(page: str, record: dict, fits: Sequence[Fits]) -> str:
    return between(page, OPEN, CLOSE, shown(record, fits), "docs/scale.md")


# Drawn

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
PARTS = {"products": "products", "passes": "passes over logits"}
PARTS |= {"exchange": "exchange of statistics", "inputs": "sum of dx", "weights": "sum of dW"}


def picture() -> Chart:
    """docs/images/scale.png: the head of docs/scale.md, each way, by the model."""
    from tools.pages import SCALED, TOKENS  # and with it the command line, which no worker needs

    in_all = 64 * TOKENS
    tokens = {f"{TOKENS:,} tokens a GPU": lambda gpus: TOKENS * gpus, f"{in_all:,} in all": lambda gpus: in_all}
    steps = [
        Step(row, way, gpus, cost.total, {said: getattr(cost, part) for part, said in PARTS.items()})
        for row, count in tokens.items()
        for way in scaling.WAYS
        for gpus in GPUS
        for cost in [scaling.head_step(count(gpus), gpus=gpus, way=way, **SCALED)]
    ]
    title = f"A head of {SCALED['hidden']:,} x {SCALED['classes']:,} in bfloat16 with its gradients: time of a step"
    caption = (
        "By fusedact.distributed.scaling for nodes of eight H200, not measured: the step, and its parts, which hide "
        "behind each other as far as the pipeline of chunks lets them. python -m bench.scale --picture"
    )
    return Chart(PICTURE.name, drawn, {"steps": steps, "title": title, "caption": caption})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: every path, no figure, no record")
    parser.add_argument("--picture", action="store_true", help="draw docs/images/scale.png and measure nothing")
    parser.add_argument("--page", action="store_true", help="put the record into docs/scale.md and measure nothing")
    parser.add_argument("--loaded", action="store_true", help="measure although other work runs on all cores")
    args = parser.parse_args()
    if args.picture:
        return picture().write(PICTURE.parent)
    if args.page:
        return _write(json.loads(RECORD.read_text()))
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores and not (args.loaded or args.smoke):
        sys.exit(f"nothing measured: a load average of {load:.1f} on {cores} cores; wait, or give --loaded")
    record = measure(args.rounds, args.smoke)
    if args.smoke:
        return print(f"{sum(map(len, record['worlds'].values()))} calls ran")
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    _write(record)


def _write(record: dict) -> None:
    fits = all_fits(record)
    PAGE.write_text(rendered(PAGE.read_text(), record, fits))
    print(shown(record, fits))


if __name__ == "__main__":
    main()
