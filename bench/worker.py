"""The process that does the units of bench/gpu.py: what crashes, hangs or loses the device ends this one alone."""

import faulthandler
import gc
import json
import os
import platform
import sys
import time
import traceback
from contextlib import nullcontext
from typing import Any

SILENCE = 90  # seconds that a unit may take before it counts as hung
PATIENCE = 3  # times that, where others' kernels try their configurations first
GRACE = 10  # seconds past its section's limit that a unit may finish in
COMPILING = 2.5  # seconds for each case left from which on torch.compile takes part


def work(job: dict) -> None:
    """The worker: answers on standard output, a line for each unit begun and one for its outcome."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer

    def answer(unit: str, **content: Any) -> None:
        print(json.dumps({"unit": unit, **content}), file=answers, flush=True)

    import torch

    device = torch.device("cuda" if torch.cuda.is_available() and not job["dry"] else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    gc.disable()  # a collection inside a graph's capture would free what must not be freed there
    with torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext():
        for done, name in enumerate(job["names"]):
            left = job["deadline"] - time.time()
            if left <= 0:
                answer(name, outcome="skipped", value="no time left")
                continue
            answer(name)
            silence = SILENCE * (PATIENCE if job["kind"] == "peers" else 1)
            faulthandler.dump_traceback_later(min(silence, left + GRACE), exit=True)
            try:
                value = _unit(job, name, device, left / (len(job["names"]) - done))
                answer(name, outcome="results", value=value)
            except MemoryError as error:
                answer(name, outcome="skipped", value=str(error))
            except Exception as error:
                traceback.print_exc()
                answer(name, outcome="errors", value=f"{type(error).__name__}: {str(error)[:500]}")
                if device.type == "cuda":
                    torch.cuda.synchronize()  # raises, which ends this worker, where the device is lost
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    faulthandler.cancel_dump_traceback_later()


def _unit(job: dict, name: str, device: Any, seconds: float) -> Any:
    """One unit of the job's kind; `seconds` is its share of what is left."""
    if job["kind"] == "facts":
        return _facts(device)
    from bench import ceilings, fits, profiles, sanitizer
    from fusedact.profiling import cases, measure, timing

    if job["kind"] == "fits":
        return fits.measure_fit({fit.name: fit for fit in fits.FITS}[name], device, job["dry"])
    if job["kind"] == "sanitized":
        unit = sanitizer.units(job["dry"])[name]
        if isinstance(unit, fits.Fit):
            return fits.measure_fit(unit, device, job["dry"], timed=False)
        return measure.check_case(unit, device)
    if job["kind"] == "profiles":
        return profiles.measure_profile(name, device, job["dry"])
    effort = timing.DRY if job["dry"] else timing.FULL
    if job["kind"] == "ceilings":
        return ceilings.CEILINGS[name](device, effort)
    if job["kind"] == "steps":
        return measure.measure_step({step.name: step for step in cases.STEPS}[name], device, effort)
    if job["kind"] == "autotuned":
        case = cases.by_name(cases.AUTOTUNED, job["dry"])[name]
        return measure.measure_case(case, device, effort, compiling="max-autotune-no-cudagraphs")
    case = cases.by_name(cases.CASES, job["dry"])[name]
    if job["kind"] == "peers":
        return measure.measure_peers(case, device, effort)
    if job["kind"] == "ops":
        return measure.measure_case(case, device, effort, compiling="default" if seconds >= COMPILING else None)
    if job["kind"] == "warm":
        return measure.warm_case(case, device)
    return measure.check_case(case, device)


def _facts(device: Any) -> dict:
    import torch
    import triton

    facts = {
        "device": f"CPU, {platform.machine()}",
        "gpu": device.type == "cuda",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory, GiB": round(properties.total_memory / 2**30, 1),
            "L2, MiB": round(properties.L2_cache_size / 2**20, 1),
        }
    return facts


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
