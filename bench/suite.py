"""The test suite as bench/gpu.py runs it: stopped in time, and what became of it."""

import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def stopped_at(process: subprocess.Popen, deadline: float) -> bool:
    """Waits; at the deadline interrupts pytest, which then still writes what it knows."""
    for signal_sent, patience in ((signal.SIGINT, deadline - time.time()), (signal.SIGKILL, 20)):
        try:
            process.wait(max(patience, 0))
            return signal_sent == signal.SIGKILL
        except subprocess.TimeoutExpired:
            process.send_signal(signal_sent)
    process.wait()
    return True


def outcomes(junit: Path) -> dict:
    """Counts, and of each test that failed its name and the first line of why."""
    cases = list(ElementTree.parse(junit).iter("testcase"))
    failures = {}
    for case in cases:
        for fault in (*case.iter("failure"), *case.iter("error")):
            first = (fault.get("message") or fault.text or "").strip().partition("\n")[0]
            failures[f"{case.get('classname')}.{case.get('name')}"] = first[:200]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failures) - skipped,
        "failed": len(failures),
        "skipped_tests": skipped,
        "failures": failures,
    }
