"""What the project stands on: pins, hashes, licences, advisories; and nothing asks for a network."""

import json
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tools import audit, lock

ROOT = Path(__file__).resolve().parents[1]
HASHED = re.compile(r"^(\S+)==(\S+)(?: ;[^\\]*)? \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)
ROW = re.compile(r"^\| ([a-z][\w-]+) \| (\S+) \| (.+) \| (.+) \|$", re.MULTILINE)
PERMISSIVE = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0",
    "CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-CMU", "PSF-2.0", "Zlib",
}  # fmt: skip
UNCHANGED = {"MPL-2.0"}  # what we use as it is and do not ship
IMPORTED = """
import json, pkgutil, sys
events = []
sys.addaudithook(lambda event, arguments: events.append(event) if event.startswith("socket.") else None)
import fusedact
names = [found.name for found in pkgutil.walk_packages(fusedact.__path__, "fusedact.")]
for name in names:
    if name != "fusedact.__main__":
        __import__(name)
print(json.dumps([len(names), events]))
"""


@pytest.mark.parametrize(("pinned", "hashes"), lock.PINS.items(), ids=lock.PINS)
def test_each_pin_has_the_hashes_of_its_files(pinned, hashes):
    pins = lock.pins(ROOT / pinned)
    text = (ROOT / hashes).read_text()
    found = {name: version for name, version, _ in HASHED.findall(text)}
    assert found == {name: version for name, version in pins.items() if name not in lock.UNHASHED}
    assert len(re.findall(r"^[^#\s]", text, re.MULTILINE)) == len(found), "a line that pip reads and this test does not"


def test_what_make_installs_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    makefile = (ROOT / "Makefile").read_text()
    for pinned, extras in zip(lock.PINS, re.findall(r'--editable "\.\[([a-z,]+)\]"', makefile)[-2:], strict=True):
        asked = [*project["dependencies"], *(t for e in extras.split(",") for t in project["optional-dependencies"][e])]
        names = {re.match(r"[\w-]+", text)[0].lower() for text in asked}
        assert names <= lock.pins(ROOT / pinned).keys()


def test_tools_run_by_hand_are_pinned_where_they_are_asked_for():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all("==" in text for name in ("fuzz", "lock", "mutants") for text in extras[name])


def test_each_pin_has_a_licence_that_ours_goes_with():
    rows = ROW.findall((ROOT / "THIRD_PARTY.md").read_text())
    pins = lock.pins(ROOT / "constraints.txt")
    assert {name: version for name, version, *_ in rows} == pins, "make lock"
    for name, _, licence, reasons in rows:
        parts = set(re.split(r" AND | OR ", licence))
        assert parts <= PERMISSIVE | UNCHANGED, name
        assert not (parts & UNCHANGED and {"run time", "gpu", "cli"} & set(reasons.split(", "))), name


class TestAudit:
    ANSWERS = (
        {"name": "a", "version": "1", "vulns": [{"id": "X-1", "aliases": ["Y-1"], "fix_versions": ["2"]}]},
        {"name": "b", "version": "1", "vulns": []},
        {"name": "c", "skip_reason": "not found"},
    )

    def test_a_known_vulnerability_fails(self, monkeypatch, capsys):
        monkeypatch.setattr(audit, "audited", lambda pins, seconds: self.ANSWERS)
        assert audit.main() == 1
        assert capsys.readouterr().out.splitlines()[0] == "a 1: X-1, fixed in 2"

    def test_one_that_is_ignored_by_any_of_its_names_does_not(self, monkeypatch):
        monkeypatch.setattr(audit, "audited", lambda pins, seconds: self.ANSWERS)
        monkeypatch.setattr(audit, "IGNORED", {"Y-1": "a reason"})
        assert audit.main() == 0

    @pytest.mark.parametrize(
        "fault", [ConnectionError("no route"), subprocess.TimeoutExpired("pip-audit", 30)], ids=["unreachable", "slow"]
    )
    def test_without_advisories_it_says_so_in_a_line_and_passes(self, monkeypatch, capsys, fault):
        def fails(pins, seconds):
            raise fault

        monkeypatch.setattr(audit, "audited", fails)
        assert audit.main() == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("pip-audit: skipped")

    @pytest.mark.parametrize(("said", "kind"), [
        ("requests.exceptions.ConnectionError: HTTPSConnectionPool: Max retries exceeded", ConnectionError),
        ("ERROR: Tip: your network may be blocking this service.", ConnectionError),
        ("requests.exceptions.HTTPError: 503 Server Error\n\npip_audit.ServiceError", ConnectionError),
        ("requests.exceptions.HTTPError: 401 Client Error\n\npip_audit.ServiceError", RuntimeError),
        ("/usr/bin/python: No module named pip_audit", RuntimeError),
        ("error: unrecognized arguments: --disable-pip", RuntimeError),
        ("", RuntimeError),
    ], ids=["no route", "blocked", "their fault", "no access", "not installed", "options", "nothing"])  # fmt: skip
    def test_only_what_is_out_of_reach_is_skipped(self, said, kind, monkeypatch):
        done = subprocess.CompletedProcess([], 1, stdout="", stderr=said)
        monkeypatch.setattr(subprocess, "run", lambda *given, **options: done)
        with pytest.raises(kind):
            audit.audited("a==1", 1.0)

    def test_another_fault_fails(self, monkeypatch):
        done = subprocess.CompletedProcess([], 1, stdout="", stderr="No module named pip_audit")
        monkeypatch.setattr(subprocess, "run", lambda *given, **options: done)
        with pytest.raises(RuntimeError, match="No module"):
            audit.main()

    def test_answers_that_hardly_know_a_package_fail(self, monkeypatch):
        probe, unknown = self.ANSWERS[1:]
        answers = iter([[probe], [probe, unknown, unknown]])
        monkeypatch.setattr(audit, "audited", lambda pins, seconds: next(answers))
        assert audit.main() == 1


@pytest.mark.parametrize("ask", [
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=0.1),
    lambda: socket.getaddrinfo("nowhere.invalid", 80),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ("192.0.2.1", 9)),
], ids=["connect", "resolve", "datagram"])  # fmt: skip
def test_a_test_that_asks_for_the_network_fails(ask):
    with pytest.raises(RuntimeError, match="asked for the network"):
        ask()


def test_this_machine_may_be_asked():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
        pass


def test_importing_every_module_opens_no_socket():
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True, cwd=ROOT)
    count, events = json.loads(done.stdout)
    assert count > 60 and not events
