"""Known vulnerabilities of what constraints.txt pins, by pip-audit; fails where it knows one that is not in IGNORED.

Where advisories cannot be had, or not in time, it says so in a line and passes: an outage stops no work. Any other
fault of pip-audit's fails, and so does an answer that knows less than half of the packages.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECONDS = 90  # for all; a probe of one package comes first
PROBE = "numpy"
UNREACHED = re.compile(  # what is said of a network that is not there and of a server's own fault
    "ConnectionError|ConnectTimeout|ReadTimeout|MaxRetryError|ProxyError|SSLError|blocking this service"
    r"|HTTPError: 5\d\d"
)
IGNORED: dict[str, str] = {}  # an advisory's name, and why it does not concern us


def audited(pins: str, seconds: float) -> list[dict[str, Any]]:
    """What pip-audit answers of each pin. ConnectionError or TimeoutExpired where advisories are out of reach."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder, "pins.txt")
        asked.write_text(pins)
        options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", "--timeout", "5"]
        command = [sys.executable, "-m", "pip_audit", *options, "--requirement", str(asked)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    if not done.stdout.startswith("{"):
        said = (done.stderr.strip() or f"no answer, status {done.returncode}").splitlines()[-1]
        raise ConnectionError(said) if UNREACHED.search(done.stderr) else RuntimeError(said)
    return json.loads(done.stdout)["dependencies"]


def findings(answers: list[dict[str, Any]]) -> list[str]:
    """A line for each advisory that is not ignored."""
    return [
        f"{each['name']} {each['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'no release'}"
        for each in answers
        for found in each.get("vulns", ())
        if not {found["id"], *found.get("aliases", ())} & IGNORED.keys()
    ]


def main() -> int:
    pins = (ROOT / "constraints.txt").read_text()
    try:
        probe = audited(next(line for line in pins.splitlines() if line.startswith(f"{PROBE}==")), SECONDS / 3)
        if "skip_reason" in probe[0]:
            raise ConnectionError(probe[0]["skip_reason"])
        answers = audited(pins, SECONDS)
    except (ConnectionError, subprocess.TimeoutExpired) as fault:
        print(f"pip-audit: skipped, no advisories to be had here: {fault}")
        return 0
    found = findings(answers)
    unknown = sum("skip_reason" in each for each in answers)
    print(*found, f"pip-audit: {len(answers) - unknown} packages, {unknown} unknown, {len(found)} findings", sep="\n")
    return bool(found) or 2 * unknown > len(answers)


if __name__ == "__main__":
    sys.exit(main())
