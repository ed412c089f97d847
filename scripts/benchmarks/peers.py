"""Compress one model with every peer, side by side, and judge all results with the same independent code.

    python scripts/benchmarks/peers.py --model DIR --calibration WINDOWS.safetensors \\
        --evaluation sotu=W1.safetensors --evaluation moby=W2.safetensors \\
        --candidate ours=FOLDER:result.json --out docs/benchmarks/peers.json

Each peer lives in its own virtual environment under .peers/ (built on first use; several GB). One worker process per
(peer, setting) runs at a time, with the same token windows and thread count; its result is kept in .peers/results/,
keyed by the model's and the windows' sha256 and the thread count: a second run only judges. `--fresh` redoes all.
WINDOWS files hold `input_ids`, int64 `[windows, tokens]`. A candidate is any folder that plain
`AutoModelForCausalLM.from_pretrained` loads, with an optional JSON of its cost (seconds, peak_rss_bytes, ...).
Writes --out as JSON and a Markdown page beside it.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).resolve().parent / "peers"
PEERS_DIR = ROOT / ".peers"
sys.path.insert(0, str(WORKERS))

from judge import named_path  # noqa: E402
from report import markdown  # noqa: E402


@dataclass(frozen=True)
class Peer:
    """A rival: its pip steps (in order), its worker, and the settings that are run."""

    name: str
    installs: tuple[tuple[str, ...], ...]
    worker: str
    settings: tuple[str, ...]

    @property
    def python(self) -> Path:
        return PEERS_DIR / self.name / "bin" / "python"


PEERS = {
    peer.name: peer
    for peer in (
        # torch first and named again: the local CPU build must not be replaced by a CUDA one.
        Peer(
            "llmcompressor",
            (("torch==2.13.0",), ("torch==2.13.0", "llmcompressor==0.14.0.1")),
            "llmcompressor_worker.py",
            ("rtn", "rtn-mse", "default", "mse", "imatrix", "batched"),
        ),
        # 7.7 asks for torch >= 2.14.1, a CUDA build from the index; it runs on the CPU all the same.
        Peer(
            "gptqmodel",
            (("gptqmodel==7.7.0",),),
            "gptqmodel_worker.py",
            ("default", "mse", "gptaq", "mse-gptaq", "mse-foem", "dynamic", "batched"),
        ),
    )
}


# --- environments and workers --------------------------------------------------------------------------------------


def build_environment(peer: Peer) -> None:
    """Create the peer's virtual environment unless a stamp says that these very installs were done."""
    stamp = PEERS_DIR / peer.name / "installed.json"
    wanted = json.dumps(peer.installs)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"{peer.name}: building {stamp.parent} (a large download the first time)", flush=True)
    if not peer.python.exists():
        venv.create(stamp.parent, with_pip=True, symlinks=True)
    for requirements in peer.installs:
        subprocess.run([peer.python, "-m", "pip", "install", "--quiet", *requirements], check=True)
    stamp.write_text(wanted)


def environment(threads: int, scratch: Path) -> dict[str, str]:
    """Return the variables all processes share: CPU only, offline, the same threads; temporary files in `scratch`."""
    count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
    workers = {"CUDA_VISIBLE_DEVICES": "", "GPTQMODEL_CPU_WORKERS": str(max(2, threads)), "TMPDIR": str(scratch)}
    return {**os.environ, **count, **quiet, **workers}


def run_logged(command: list[str], threads: int, log: Path) -> None:
    """Run `command` with its output in `log`. Raises RuntimeError with the end of it where the command fails."""
    with log.open("w") as stream, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        variables = environment(threads, Path(scratch))
        done = subprocess.run(command, env=variables, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{Path(command[1]).name} failed ({done.returncode}); the end of {log}:\n{tail}")


def run_peer(peer: Peer, setting: str, arguments: argparse.Namespace) -> Path:
    """Return the folder with the dense checkpoint and result.json of one (peer, setting), run now or found cached."""
    key = [*identity(arguments.model), sha256(arguments.calibration), str(arguments.threads), *map(str, peer.installs)]
    key.append(str(arguments.bits))
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:12]
    out = PEERS_DIR / "results" / f"{peer.name}-{setting}-{arguments.bits}bit-{digest}"
    if (out / "result.json").exists() and not arguments.fresh:
        print(f"{peer.name} {setting}: cached", flush=True)
        return out
    build_environment(peer)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    start = time.perf_counter()
    command = [str(peer.python), str(WORKERS / peer.worker), "--setting", setting, "--out", str(out)]
    command += ["--model", str(arguments.model), "--windows", str(arguments.calibration), "--bits", str(arguments.bits)]
    run_logged(command, arguments.threads, out / "log.txt")
    print(f"{peer.name} {setting}: {time.perf_counter() - start:.0f} s in all", flush=True)
    return out


def run_peers(
    peers: list[Peer], settings: list[str], arguments: argparse.Namespace
) -> tuple[dict[str, Path], dict[str, str]]:
    """Run every wanted setting; return the folders that came out, and the messages of those that failed."""
    folders, failures = {}, {}
    for peer in peers:
        for setting in (name for name in peer.settings if name in settings):
            try:
                folders[f"{peer.name} {setting}"] = run_peer(peer, setting, arguments)
            except RuntimeError as error:  # a peer's failure is a result too, and the others are still worth having
                failures[f"{peer.name} {setting}"] = str(error)
                print(f"{peer.name} {setting}: {error}", file=sys.stderr, flush=True)
    return folders, failures


# --- judging -------------------------------------------------------------------------------------------------------


def run_judge(folders: dict[str, Path], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the judge's scores by evaluation text and name, computed in a fresh process."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "scores.json"
        command = [sys.executable, str(WORKERS / "judge.py"), "--model", str(arguments.model), "--out", str(out)]
        for name, path in arguments.evaluation:
            command += ["--evaluation", f"{name}={path}"]
        for name, path in folders.items():
            command += ["--candidate", f"{name}={path}"]
        run_logged(command, arguments.threads, Path(scratch) / "log.txt")
        scores: dict[str, Any] = json.loads(out.read_text())
    return scores


# --- provenance ----------------------------------------------------------------------------------------------------


@functools.cache
def sha256(path: Path) -> str:
    """Return the file's sha256 in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def identity(model: Path) -> list[str]:
    """Return what makes the model's results: the sha256 of its config and weight files."""
    return [sha256(path) for path in [model / "config.json", *sorted(model.glob("*.safetensors"))]]


def window_shape(path: Path) -> list[int]:
    """Return [windows, tokens] of a windows file."""
    with safe_open(path, framework="numpy") as file:
        return list(file.get_slice("input_ids").get_shape())


def describe_machine(threads: int) -> dict[str, Any]:
    """Return what the timings depend on."""
    cpus = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": f"{len(cpus)} x {cpus[0]}" if cpus else platform.machine(),
        "threads": threads,
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "judge": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "compressed-tensors")},
    }


# --- command line --------------------------------------------------------------------------------------------------


def candidate(text: str) -> tuple[str, Path, Path | None]:
    """Parse NAME=FOLDER or NAME=FOLDER:result.json."""
    name, path = named_path(text)
    folder, _, result = str(path).partition(":")
    return name, Path(folder), Path(result) if result else None


def chosen(text: str | None, known: list[str], what: str) -> list[str]:
    """Return the comma-separated names of `text`, or all that are known. Raises SystemExit with the nearest name."""
    names = text.split(",") if text else known
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise SystemExit(
                f"no {what} named {name!r}; have {', '.join(known)}{f'; did you mean {near[0]}?' if near else ''}"
            )
    return names


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description="Compress one model with every peer and judge the results alike.")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the source")
    parser.add_argument("--calibration", type=Path, required=True, metavar="WINDOWS")
    parser.add_argument("--evaluation", type=named_path, action="append", required=True, metavar="NAME=WINDOWS")
    parser.add_argument("--candidate", type=candidate, action="append", default=[], metavar="NAME=FOLDER[:result.json]")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--peers", help=f"comma-separated; default: {','.join(PEERS)}; 'none' for candidates alone")
    parser.add_argument("--settings", help="comma-separated; default: all of each peer")
    parser.add_argument("--bits", type=int, default=4, help="bits a weight (default 4)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--fresh", action="store_true", help="quantise again instead of using .peers/results")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    peers = [] if arguments.peers == "none" else [PEERS[name] for name in chosen(arguments.peers, list(PEERS), "peer")]
    known = sorted({setting for peer in PEERS.values() for setting in peer.settings})
    settings = chosen(arguments.settings, known, "setting")
    folders, failures = run_peers(peers, settings, arguments)
    runs = {name: json.loads((folder / "result.json").read_text()) for name, folder in folders.items()}
    for name, folder, cost in arguments.candidate:
        folders[name] = folder
        if cost:
            runs[name] = json.loads(cost.read_text())
    windows, tokens = window_shape(arguments.calibration)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(arguments.threads),
        "model": {
            "name": arguments.model.name,
            "sha256": hashlib.sha256("".join(identity(arguments.model)).encode()).hexdigest(),
        },
        "bits": arguments.bits,
        "group_size": 64,
        "calibration": {"windows": windows, "tokens": tokens, "sha256": sha256(arguments.calibration)},
        "evaluation": {name: window_shape(path) for name, path in arguments.evaluation},
        "candidates": [name for name, _, _ in arguments.candidate],
        "failures": failures,
        "runs": runs,
        "quality": run_judge(folders, arguments),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    page = arguments.out.with_suffix(".md")
    page.write_text(markdown(result))
    print(f"{arguments.out}\n{page}")


if __name__ == "__main__":
    main()
