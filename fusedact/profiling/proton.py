"""Triton's own profiler, Proton, around an op or a trainer's steps, in a process of its own.

CUPTI serves one profiler of a process, and torch's has it already; whatever fails there is a line here.
"""

import ctypes
import faulthandler
import json
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

SECONDS = 60  # that it may take: the kernels are compiled already
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
METRICS = ("count", "time (ns)", "bytes", "flops8", "flops16", "flops32", "flops64")


def profiled(name: str, device: Any, choice: dict[str, Any], steps: int, path: Path | None) -> dict[str, Any]:
    """{"rows", "file"}, of the fused steps, or {"error"}."""
    with tempfile.TemporaryDirectory() as folder:
        written = path or Path(folder) / "proton.hatchet"
        job = {"name": name, "device": str(device), "choice": choice, "steps": steps, "path": str(written)}
        try:
            subprocess.run(
                [sys.executable, "-m", "fusedact.profiling.proton", json.dumps(job)],
                check=True, capture_output=True, text=True, timeout=SECONDS,
            )  # fmt: skip
            found = rows(json.loads(written.read_text()), steps)
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines()
            return {"error": lines[-1] if lines else f"exit code {error.returncode}"}
        except (subprocess.TimeoutExpired, OSError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
    return {"rows": found, "file": path and str(path)} if found else {"error": "it recorded no kernel"}


def rows(trees: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Proton's JSON, trees of {frame, metrics, children}: its kernels, each with what a step took of it."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def walk(node: dict[str, Any], launch: str | None) -> None:
        metrics = node.get("metrics", {})
        if "bytes" in metrics:  # as a launch told; its time may stand below it, under the kernel's own name
            launch = node["frame"]["name"]
        for metric in METRICS:
            if metric in metrics:
                found[launch or node["frame"]["name"]][metric] += metrics[metric] / steps
        for child in node.get("children", []):
            walk(child, launch)

    for tree in trees:
        if "frame" in tree:  # the last one tells of the device
            walk(tree, None)
    named = [{"name": name, **metrics} for name, metrics in found.items()]
    return sorted(named, key=lambda row: -row.get("time (ns)", 0))


def end_in_time() -> None:
    """Else this process outlives one that is killed in its wait, and disturbs what the GPU is measured for next."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(job: dict[str, Any]) -> None:
    end_in_time()
    import torch
    import triton.profiler as profiler

    from fusedact.profiling.timing import undisturbed, wait
    from fusedact.profiling.tracing import WARM_UP, unit_of

    device, path = torch.device(job["device"]), Path(job["path"])
    choice = job["choice"]
    if choice.get("shape") is not None:
        choice["shape"] = tuple(choice["shape"])
    with undisturbed(device, 1):
        step = unit_of(job["name"], device, inference=True, **choice).steps(device)["fused"]
        for _ in range(WARM_UP):
            step()
        wait()
        path.parent.mkdir(parents=True, exist_ok=True)
        session = profiler.start(str(path.with_suffix("")), hook="triton")
        for _ in range(job["steps"]):
            with profiler.scope("step"):
                step()
        wait()
        profiler.finalize(session)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
