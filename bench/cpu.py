"""The README's figures of a CPU: measured, written to bench/results/cpu.json, and put into the README from there.

python -m bench.cpu [--page-only]
"""

import json
import platform
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from bench.report import between
from fusedact.cli.training import COMPARED
from fusedact.trainers import LAYERS, TRAINERS, Binary
from fusedact.trainers.runs import Run, train
from fusedact.trainers.sweep import sweep_xor

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "bench" / "results" / "cpu.json"
PAGE = ROOT / "README.md"
OPEN, CLOSE = "<!-- cpu-figures -->", "<!-- /cpu-figures -->"
WAYS = COMPARED | {"fit": ("stock", "auto")}
COMPARISONS = {
    "S1 `binary`, where every step meets BCELoss's clamp": ("binary", {"epochs": 1000}),
    "S1 `binary --start 0.01,0.02,-0.01,0.1`": ("binary", {"epochs": 1000, "start": (0.01, 0.02, -0.01, 0.1)}),
    "S2 `perceptron`": ("perceptron", {"epochs": 300}),
    "S3 `xor`": ("xor", {"epochs": 500}),
    "S5 `mnist-softmax`, the embedded images": ("mnist-softmax", {}),
    "S6 `mnist-mlp`, the embedded images": ("mnist-mlp", {"epochs": 5}),
}
LOSSES = {
    "Sigmoid, then BCELoss": {},
    "BCE on logits": {"logits": True},
    "BCE on logits, standardized inputs": {"logits": True, "standardize": True},
}


def measure() -> dict:
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    swept = sweep_xor(1000)
    return {
        "kind": "cpu",
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
        "compared": {label: _compared(name, options) for label, (name, options) in COMPARISONS.items()},
        "losses": {label: _loss(options) for label, options in LOSSES.items()},
        "sweep": dict(zip(map(str, swept.lrs), swept.shares[:, -1].tolist(), strict=True)),
    }


def _compared(name: str, options: dict) -> dict:
    settings = replace(TRAINERS[name].defaults, **options)
    runs = {
        way: Run(TRAINERS[name](LAYERS[nn], replace(settings, engine=engine))) for way, (nn, engine) in WAYS.items()
    }
    train(runs, None, None, lambda run, some: None)
    stock, fit = ([epoch.cost for epoch in runs[way].epochs] for way in ("stock", "fit"))
    farthest = max(abs(a - b) / abs(b) for a, b in zip(fit, stock, strict=True))
    times = {way: run.step_microseconds for way, run in runs.items()}
    return {"epochs": settings.epochs, "engine": runs["fit"].trainer.engine, "step_us": times, "farthest": farthest}


def _loss(options: dict) -> dict:
    trainer = Binary(LAYERS["stock"], replace(Binary.defaults, **options))
    *_, last = trainer.epochs()
    return {"cost": last.cost, "right": trainer.evaluate().accuracy}


def figures(record: dict) -> str:
    lines = [
        f"CPU time of a step, medians of runs that took turns, {record['date']}, commit {record['commit']},",
        f"{record['machine']}: record `bench/results/cpu.json`, by `python -m bench.cpu`. The machine is shared: read",
        "them to one digit. The last column is the farthest that an epoch's cost is from stock's, relative.",
        "",
        "| | epochs | tutorial's loop / fit | stock layers, rows in memory / fit | fit, µs | costs |",
        "|---|---|---|---|---|---|",
    ]
    for label, found in record["compared"].items():
        tutorial, stock, fit = (found["step_us"][way][0] for way in ("tutorial", "stock", "fit"))
        ratios = f"{tutorial / fit:.1f} | {stock / fit:.1f} | {fit:.1f}"
        lines.append(f"| {label} | {found['epochs']:,} | {ratios} | {found['farthest']:.0e} |")
    lines += ["", "| one layer, S1's start and epochs | cost at the end | right on validation rows |", "|---|---|---|"]
    lines += [f"| {label} | {found['cost']:.3f} | {found['right']:.2f} |" for label, found in record["losses"].items()]
    shares = ", ".join(f"{share:.1%} at {lr}" for lr, share in record["sweep"].items())
    return "\n".join([*lines, "", f"XOR learned by epoch 10,000, of 1,000 initializations at each rate: {shares}."])


def rendered(page: str) -> str:
    return between(page, OPEN, CLOSE, figures(json.loads(RECORD.read_text())))


if __name__ == "__main__":
    if "--page-only" not in sys.argv:
        RECORD.write_text(json.dumps(measure(), indent=1) + "\n")
    PAGE.write_text(rendered(PAGE.read_text()))
