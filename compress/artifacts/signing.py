"""Signatures by the tools people have keys for: ssh-keygen -Y and gpg. Nothing is signed or checked by our own code.

ssh: namespace `compress-waiver`. Who may sign stands in `<store>/allowed_signers`, in the format of ssh-keygen(1):

    anna@example.org namespaces="compress-waiver" ssh-ed25519 AAAA...

gpg: a detached armoured signature, checked against the keyring of whoever checks.
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compress.errors import EnvironmentLacksError, RecipeError

NAMESPACE = "compress-waiver"
SIGNERS_NAME = "allowed_signers"
_PACKAGES = {"ssh-keygen": "openssh-client", "gpg": "gnupg"}


@dataclass(frozen=True)
class Signature:
    """An armoured signature, and the key that made it: `ssh SHA256:...` or `gpg <fingerprint>`."""

    text: str
    signed_by: str


@dataclass(frozen=True)
class Checked:
    """valid: the bytes are those that were signed, by a listed or known key. unlisted: by a key nobody listed.

    unknown: it cannot be told here (no such key in the keyring). bad: other bytes, another key, or no signature.
    """

    state: Literal["valid", "unlisted", "unknown", "bad"]
    sentence: str
    signer: str | None = None


def key_of_ssh(key: Path) -> str:
    """`ssh SHA256:...` of a private or public key file."""
    if not key.is_file():
        raise RecipeError(f"--sign-with {key}: no such key file; `ssh-keygen -t ed25519` makes one.")
    done = _run(["ssh-keygen", "-lf", str(key)])
    if done.returncode:
        raise RecipeError(f"--sign-with {key}: not an ssh key ({_last_line(done)})")
    return f"ssh {done.stdout.decode().split()[1]}"


def sign_ssh(data: bytes, key: Path) -> str:
    """The signature over `data`. A passphrase is asked for on the terminal, or the agent has the key."""
    done = _run(["ssh-keygen", "-Y", "sign", "-q", "-f", str(key), "-n", NAMESPACE], data)
    if done.returncode:
        raise RecipeError(f"--sign-with {key}: ssh-keygen could not sign ({_last_line(done)})")
    return done.stdout.decode("ascii")


def key_of_gpg(identity: str) -> str:
    """`gpg <fingerprint>` of a secret key."""
    done = _run(["gpg", "--batch", "--with-colons", "--list-secret-keys", "--", identity])
    prints = [line.split(":")[9] for line in done.stdout.decode().splitlines() if line.startswith("fpr:")]
    if done.returncode or not prints:
        raise RecipeError(f"--gpg-key {identity}: gpg has no such secret key; `gpg --list-secret-keys` shows yours.")
    return f"gpg {prints[0]}"


def sign_gpg(data: bytes, signed_by: str) -> str:
    key = signed_by.removeprefix("gpg ")
    done = _run(["gpg", "--batch", "--yes", "--armor", "--local-user", key, "--detach-sign", "--output", "-"], data)
    if done.returncode:
        raise RecipeError(f"--gpg-key {key}: gpg could not sign ({_last_line(done)})")
    return done.stdout.decode("ascii")


def check(data: bytes, signature: Signature, signers: Path | None) -> Checked:
    """Is this `signature` over these bytes, and by whom? `signers`: the store's allowed_signers, if there is one.

    Raises EnvironmentLacksError when the tool that could tell is not installed.
    """
    kind = signature.signed_by.split(" ")[0]
    if kind == "ssh":
        return _check_ssh(data, signature, signers)
    if kind == "gpg":
        return _check_gpg(data, signature)
    return Checked("bad", f"signed by {signature.signed_by!r}, which names no kind of key")


def _check_ssh(data: bytes, signature: Signature, signers: Path | None) -> Checked:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "signature"
        path.write_text(signature.text)
        plain = _run(["ssh-keygen", "-Y", "check-novalidate", "-n", NAMESPACE, "-s", str(path)], data)
        key = signature.signed_by.removeprefix("ssh ")
        if plain.returncode or key not in plain.stdout.decode().split():
            return Checked("bad", "the signature does not fit what is signed, or the key that is named")
        if signers is None:
            return Checked("unlisted", f"signature valid, signer not in {SIGNERS_NAME} (the store has none)", key)
        found = _run(["ssh-keygen", "-Y", "find-principals", "-s", str(path), "-f", str(signers)])
        for principal in found.stdout.decode().splitlines() if found.returncode == 0 else []:
            asked = ["-Y", "verify", "-n", NAMESPACE, "-s", str(path), "-f", str(signers), "-I", principal]
            if _run(["ssh-keygen", *asked], data).returncode == 0:
                return Checked("valid", f"signature valid, by {principal}", principal)
    return Checked("unlisted", f"signature valid, signer not in {SIGNERS_NAME}", key)


def _check_gpg(data: bytes, signature: Signature) -> Checked:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "signature"
        path.write_text(signature.text)
        done = _run(["gpg", "--batch", "--status-fd", "1", "--verify", str(path), "-"], data)
    words = [line.split()[1:] for line in done.stdout.decode(errors="replace").splitlines() if "[GNUPG:]" in line]
    keys = [key for line in words if line[0] == "VALIDSIG" for key in (line[1], line[-1])]
    if signature.signed_by.removeprefix("gpg ") in keys and done.returncode == 0:
        return Checked("valid", f"signature valid, by {signature.signed_by}", signature.signed_by)
    if any(line[0] == "NO_PUBKEY" for line in words):
        return Checked("unknown", f"signature not checked: {signature.signed_by} is not in gpg's keyring here")
    return Checked("bad", "the signature does not fit what is signed, or the key that is named")


def _run(command: list[str], data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, input=data, capture_output=True, check=False)
    except FileNotFoundError:
        tool = command[0]
        raise EnvironmentLacksError(f"{tool} is not installed; it comes with {_PACKAGES[tool]}.") from None


def _last_line(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"it ended with {done.returncode}"
