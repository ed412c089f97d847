"""Push to object stores and pull from them, through their real protocols, spoken by emulators on this machine.

    make object-stores        or: python scripts/object_stores.py [--out FILE.json]

Builds an environment in .loaders/object-stores/ with the clients (s3fs, gcsfs, adlfs) and the emulators (moto for S3,
gcp-storage-emulator for Google's, Azurite from npm for Azure's), starts the emulators, and runs
tests/artifacts/test_transport.py with buckets in place of folders: round trips, interrupted pushes and pulls, damaged
and foreign bytes.
These are not the services themselves: their permissions, throttling and consistency are not tried.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / ".loaders" / "object-stores"
RECORD = ROOT / "docs" / "benchmarks" / "object-stores.json"
PACKAGES = (
    "s3fs==2026.9.0",
    "gcsfs==2026.10.1",
    "adlfs==2026.8.0",
    "moto[server]==5.2.5",
    "gcp-storage-emulator==2026.7.19",
)
AZURITE = "azurite@3.37.0"
PORTS = {"s3": 5201, "gs": 5202, "az": 5203}
# The account and key that Azurite documents for everybody.
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def build() -> Path:
    """The environment's packages, installed once for these versions."""
    stamp, wanted = PLACE / "installed.json", json.dumps([*PACKAGES, AZURITE])
    if not (stamp.is_file() and stamp.read_text() == wanted):
        print(f"building {PLACE}", flush=True)
        venv.create(PLACE, with_pip=True, symlinks=True)
        subprocess.run([PLACE / "bin" / "python", "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        if shutil.which("npm"):
            subprocess.run(["npm", "install", "--silent", "--prefix", str(PLACE), AZURITE], check=True)
        stamp.write_text(wanted)
    return next(PLACE.glob("lib/python3*/site-packages"))


def environment(packages: Path) -> dict[str, str]:
    """What tells the clients to talk to the emulators."""
    account = f"AccountName=devstoreaccount1;AccountKey={AZURE_KEY}"
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)]),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORTS['s3']}",
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{PORTS['gs']}",
        "AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=http;{account};"
        f"BlobEndpoint=http://127.0.0.1:{PORTS['az']}/devstoreaccount1;",
    }


@contextmanager
def emulators() -> Iterator[list[str]]:
    """Start them; gives the kinds of URL that answer."""
    commands = {
        "s3": [PLACE / "bin" / "moto_server", "-p", str(PORTS["s3"])],
        "gs": [PLACE / "bin" / "gcp-storage-emulator", "start", f"--port={PORTS['gs']}", "--host=127.0.0.1",
               "--in-memory"],
        "az": [PLACE / "node_modules" / ".bin" / "azurite-blob", "--skipApiVersionCheck", "--inMemoryPersistence",
               "--blobPort", str(PORTS["az"])],
    }  # fmt: skip
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for kind, command in commands.items():
            if not Path(command[0]).exists():
                print(f"{kind}: left out, {command[0]} is not there (Azurite needs npm)", flush=True)
                continue
            log = (PLACE / f"{kind}.log").open("wb")
            running[kind] = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, cwd=PLACE)
        for kind, process in running.items():
            _wait(kind, process)
        yield list(running)
    finally:
        for process in running.values():
            process.kill()  # nothing of theirs is kept, and Azurite waits for open connections
            process.wait()


def _wait(kind: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORTS[kind]}/", timeout=2).close()
            return
        except urllib.error.HTTPError:
            return  # it answers, and wants more than this
        except OSError:
            time.sleep(0.3)
    raise SystemExit(f"the emulator of {kind} did not start; see {PLACE / f'{kind}.log'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=RECORD, help="JSON with what passed, by kind of URL (default: docs/benchmarks)"
    )
    arguments = parser.parse_args()
    packages = build()
    results = PLACE / "results.xml"
    with emulators() as kinds:
        told = {**environment(packages), "COMPRESS_OBJECT_STORES": " ".join(kinds), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/artifacts/test_transport.py",
                   "-k", " or ".join(f"{kind}-bucket" for kind in kinds), f"--junitxml={results}"]  # fmt: skip
        code = subprocess.run(command, env=told, cwd=ROOT, check=False).returncode
    counts = {kind: {"passed": 0, "failed": 0, "skipped": 0} for kind in kinds}
    for case in ElementTree.parse(results).iter("testcase"):
        kind = next(kind for kind in kinds if f"{kind}-bucket" in case.attrib["name"])
        said = {child.tag for child in case}
        counts[kind]["failed" if said & {"failure", "error"} else "skipped" if "skipped" in said else "passed"] += 1
    print(json.dumps(counts, indent=2))
    document = {"packages": [*PACKAGES, AZURITE], "date": time.strftime("%Y-%m-%d"), "tests": counts}
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
