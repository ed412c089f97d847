"""Promote, roll back and waive: what is refused, what a deploy job reads, and who answered for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from compress.artifacts import manifest
from compress.artifacts.audit import audit, audit_channel
from compress.artifacts.desk import promote, rollback, waive
from compress.artifacts.store import Store
from compress.errors import CompressError, RecipeError, RefusedError

from .conftest import KL_GATE, SIZE_GATE, overwrite, with_gates

Publish = Callable[..., Path]
KL = "threshold:divergence.held-out.mean_kl"
LATER = datetime(2099, 1, 1, tzinfo=UTC)


def channel_file(store: Store, channel: str = "production") -> dict[str, object]:
    return dict(json.loads((store.root / "demo" / "channels" / f"{channel}.json").read_text()))


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    overwrite(path, content[:-1] + bytes([content[-1] ^ 1]))


def test_a_deploy_job_reads_version_path_and_digest(store: Store, publish: Publish) -> None:
    path = publish()
    promote(store, "demo", "v1", "production", by="anna", note="first release")
    read = channel_file(store)
    assert (read["name"], read["channel"], read["version"], read["by"]) == ("demo", "production", "v0001", "anna")
    assert store.root / str(read["path"]) == path
    assert read["digest"] == manifest.read(path).digest
    assert read["note"] == "first release"
    assert datetime.fromisoformat(str(read["since"])) <= datetime.now(UTC)


def test_promoted_is_none_until_something_was(store: Store, publish: Publish) -> None:
    publish()
    assert store.promoted("demo", "staging") is None
    promote(store, "demo", "v0001", "staging")
    held = store.promoted("demo", "staging")
    assert held is not None and held.reference == "demo@v0001"
    assert store.promoted("demo", "production") is None
    assert store.find("demo@staging") == held.path


def test_find_says_when_nothing_was_promoted(store: Store, publish: Publish) -> None:
    publish()
    with pytest.raises(RecipeError, match="ever promoted to production"):
        store.find("demo@production")


def test_find_refuses_a_channel_that_the_history_does_not_tell_of(store: Store, publish: Publish) -> None:
    first, second = publish(), publish()
    promote(store, "demo", "v1", "production")
    channel = store.root / "demo" / "channels" / "production.json"
    kept = channel.read_text()
    channel.write_text(kept.replace("v0001", "v0002"))
    with pytest.raises(CompressError, match=r"is not what line 3(.|\n)*as demo@v0001"):
        store.find("demo@production")
    publish()  # without a later line, a missing file would be a crash before it was written
    channel.unlink()
    with pytest.raises(CompressError, match="missing, though it should hold v0001"):
        store.find("demo@production")
    result = audit_channel(store, "demo", "production")
    assert not result.ok and "missing, though it should hold v0001" in result.problems[0]
    channel.write_text(kept.replace("v0001", "v0009"))
    with pytest.raises(CompressError, match="is not what line 3") as raised:
        store.find("demo@production")
    assert not isinstance(raised.value, RecipeError)
    assert "is not what line 3" in audit_channel(store, "demo", "production").problems[0]
    channel.write_text(kept)
    assert store.find("demo@production") == first

    shutil.rmtree(first)
    shutil.copytree(second, first)
    with pytest.raises(CompressError, match="put v0001 there with the digest"):
        store.find("demo@production")


def test_find_of_a_promotion_that_a_crash_cut_gives_what_the_file_says(store: Store, publish: Publish) -> None:
    first = publish()
    publish()
    promote(store, "demo", "v1", "production")
    channel = store.root / "demo" / "channels" / "production.json"
    before = channel.read_text()
    promote(store, "demo", "v2", "production")
    channel.write_text(before)  # the line was written, the file not replaced

    assert store.find("demo@production") == first


def test_a_first_promotion_that_a_crash_cut_is_told_as_such(store: Store, publish: Publish) -> None:
    publish()
    promote(store, "demo", "v1", "production")
    (store.root / "demo" / "channels" / "production.json").unlink()
    for ask in (lambda: store.find("demo@production"), lambda: audit_channel(store, "demo", "production")):
        with pytest.raises(RecipeError, match=r"line 2 was not carried out(.|\n)*promote again"):
            ask()


def test_promoting_what_is_there_already_changes_nothing(store: Store, publish: Publish) -> None:
    publish()
    assert promote(store, "demo", "v1", "staging").changed
    assert not promote(store, "demo", "v1", "staging").changed
    assert len(store.history("demo").lines) == 2


@pytest.mark.parametrize("verdict", ["failed", "inconclusive"])
def test_a_version_that_did_not_pass_is_refused_with_its_gates_and_the_way_out(
    store: Store, publish: Publish, verdict: str
) -> None:
    publish(verdict=verdict, prepare=with_gates(KL_GATE))
    with pytest.raises(RefusedError) as raised:
        promote(store, "demo", "r1", "staging")
    assert KL_GATE["sentence"] in str(raised.value)
    assert f"compress waive demo r0001 --gate {KL}" in str(raised.value)
    assert store.promoted("demo", "staging") is None


@pytest.mark.parametrize("quick", [False, True])
def test_a_damaged_version_is_refused(store: Store, publish: Publish, quick: bool) -> None:
    path = publish()
    overwrite(path / "recipe.yaml", b"schema: 1\n# more\n")
    with pytest.raises(CompressError, match=r"damaged(.|\n)*recipe\.yaml: 17 bytes"):
        promote(store, "demo", "v1", "staging", quick=quick)
    assert not (store.root / "demo" / "channels").exists()


def test_quick_does_not_hash_and_the_history_says_so(store: Store, publish: Publish) -> None:
    flip_last_byte(publish() / "recipe.yaml")
    with pytest.raises(CompressError, match="bytes have changed"):
        promote(store, "demo", "v1", "staging")
    promote(store, "demo", "v1", "staging", quick=True)
    assert "bytes not hashed" in store.history("demo").lines[-1].detail


def test_an_edited_manifest_is_refused_by_quick_too(store: Store, publish: Publish) -> None:
    path = publish(verdict="failed") / "manifest.json"
    overwrite(path, path.read_bytes().replace(b'"failed"', b'"passed"'))
    with pytest.raises(CompressError, match="has been edited"):
        promote(store, "demo", "r1", "staging", quick=True)


def test_an_unknown_channel_or_version_is_answered_with_the_nearest(store: Store, publish: Publish) -> None:
    publish()
    with pytest.raises(RecipeError, match='Did you mean "production"'):
        promote(store, "demo", "v1", "prodution")
    with pytest.raises(RecipeError, match="newest is v0001"):
        promote(store, "demo", "v7", "staging")
    with pytest.raises(RecipeError, match="no channel"):
        store.promoted("demo", "../../etc/passwd")


@pytest.mark.parametrize("link", ["channels", "channels/production.json"])
def test_a_channel_that_is_a_link_is_refused(store: Store, publish: Publish, tmp_path: Path, link: str) -> None:
    publish()
    outside = tmp_path / "outside"
    outside.mkdir()
    (store.root / "demo" / link).parent.mkdir(exist_ok=True)
    (store.root / "demo" / link).symlink_to(outside)
    with pytest.raises(RecipeError, match="link"):
        promote(store, "demo", "v1", "production")
    with pytest.raises(RecipeError, match="link"):
        store.promoted("demo", "production")
    assert "a link" in "\n".join(audit(store).problems)
    assert list(outside.iterdir()) == []
    assert [line.event for line in store.history("demo").lines] == ["published"]


@pytest.mark.parametrize("key", ["version", "path", "digest", "by", "since", "name", "channel"])
def test_an_edited_channel_is_named_and_going_to_a_version_mends_it(store: Store, publish: Publish, key: str) -> None:
    publish()
    publish()
    promote(store, "demo", "v1", "production")
    publish()
    path = store.root / "demo" / "channels" / "production.json"
    content = json.loads(path.read_text())
    content[key] = {"version": "v0002", "path": "../../etc", "since": "2020-01-01T00:00:00Z"}.get(key, "f" * 64)
    path.write_text(json.dumps(content, indent=2) + "\n")
    assert any("production.json: is not what line 3" in problem for problem in audit(store).problems)
    if key in ("path", "name", "channel"):
        with pytest.raises(CompressError, match="edited or moved"):
            store.promoted("demo", "production")
    with pytest.raises(CompressError, match=r"line 5 records that channels/production\.json"):
        promote(store, "demo", "v1", "production")
    rollback(store, "demo", "production", to="v1")
    assert audit(store).ok


def test_a_flipped_bit_of_a_channel_is_noticed(store: Store, publish: Publish) -> None:
    publish()
    promote(store, "demo", "v1", "production")
    path = store.root / "demo" / "channels" / "production.json"
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert any("channels/production.json" in problem for problem in audit(store).problems), position


# --- going back -----------------------------------------------------------------------------------------------------


def test_rollback_goes_back_one_version_at_a_time(store: Store, publish: Publish) -> None:
    for number in range(1, 4):
        publish()
        promote(store, "demo", f"v{number}", "production")
    assert rollback(store, "demo", "production").channel.version == "v0002"
    assert rollback(store, "demo", "production").channel.version == "v0001"
    with pytest.raises(RecipeError, match=r"back at v0001.*v0002, v0003"):
        rollback(store, "demo", "production")
    assert channel_file(store)["version"] == "v0001"
    assert audit(store).ok


def test_rollback_to_a_version_takes_what_lies_above_it_away(store: Store, publish: Publish) -> None:
    for number in range(1, 4):
        publish()
        promote(store, "demo", f"v{number}", "production")
    moved = rollback(store, "demo", "production", to="v1", by="anna", note="v2 is no better")
    assert (moved.before, moved.channel.version, moved.channel.by) == ("v0003", "v0001", "anna")
    promote(store, "demo", "v3", "production")
    assert rollback(store, "demo", "production").channel.version == "v0001"


def test_channels_are_apart(store: Store, publish: Publish) -> None:
    publish()
    publish()
    promote(store, "demo", "v1", "production")
    promote(store, "demo", "v2", "staging")
    with pytest.raises(RecipeError, match="never held anything but v0002"):
        rollback(store, "demo", "staging")
    assert channel_file(store)["version"] == "v0001"


def test_rollback_refuses_a_damaged_version_and_a_missing_one(store: Store, publish: Publish) -> None:
    paths = [publish(), publish(), publish()]
    for number in (1, 2, 3):
        promote(store, "demo", f"v{number}", "production")
    flip_last_byte(paths[1] / "model" / "config.json")
    with pytest.raises(CompressError, match=r"demo@v0002 is damaged(.|\n)*config\.json"):
        rollback(store, "demo", "production")
    (paths[1] / "manifest.json").unlink()
    with pytest.raises(RecipeError, match="name another with --to"):
        rollback(store, "demo", "production")
    assert channel_file(store)["version"] == "v0003"
    with pytest.raises(RecipeError, match="nothing of demo was ever promoted to staging"):
        rollback(store, "demo", "staging")


def test_rollback_to_a_named_version_works_although_the_history_is_damaged(store: Store, publish: Publish) -> None:
    for number in (1, 2):
        publish()
        promote(store, "demo", f"v{number}", "production")
    path = store.root / "demo" / "history.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(CompressError, match="--to"):
        rollback(store, "demo", "production")
    rollback(store, "demo", "production", to="v1")
    assert channel_file(store)["version"] == "v0001"
    assert not audit(store).ok


# --- waivers --------------------------------------------------------------------------------------------------------


def test_a_waiver_lets_a_rejected_run_go_on_until_it_ends(store: Store, publish: Publish) -> None:
    publish(verdict="failed", prepare=with_gates(KL_GATE))
    given = waive(store, "demo", "r1", [KL], "only for the demo", "2030-01-31", by="anna")
    assert (given.who, given.reason, given.gates, given.signed_by) == ("anna", "only for the demo", (KL,), None)
    assert given.until == datetime(2030, 1, 31, 23, 59, 59, tzinfo=UTC)
    moved = promote(store, "demo", "r1", "production")
    assert moved.waived_by == (given,)
    assert channel_file(store)["path"] == "demo/rejected/r0001"
    assert audit(store).ok
    after = audit(store, now=LATER)
    assert after.ok and "whose waivers count no more" in "\n".join(after.notes)
    with pytest.raises(RefusedError, match="ended on 2030-01-31"):
        promote(store, "demo", "r1", "staging", now=LATER)


def test_rollback_to_a_version_whose_waiver_ended_is_refused(store: Store, publish: Publish) -> None:
    publish(verdict="failed", prepare=with_gates(KL_GATE))
    publish()
    waive(store, "demo", "r1", [KL], "once", "2030-01-31")
    promote(store, "demo", "r1", "production")
    promote(store, "demo", "v1", "production")
    with pytest.raises(RefusedError, match="ended on"):
        rollback(store, "demo", "production", now=LATER)
    assert rollback(store, "demo", "production").channel.version == "r0001"


def test_every_gate_that_counts_must_be_waived_and_advisory_ones_need_not(store: Store, publish: Publish) -> None:
    advisory = {**KL_GATE, "measure": "perplexity.held-out", "tier": "advisory"}
    supporting = {**SIZE_GATE, "tier": "supporting", "verdict": "inconclusive"}
    publish(verdict="failed", prepare=with_gates(KL_GATE, supporting, advisory))
    waive(store, "demo", "r1", ["divergence.held-out.mean_kl"], "a reason", "2099-01-01")
    with pytest.raises(RefusedError, match=r"covers size:weight_bytes\."):
        promote(store, "demo", "r1", "staging")
    waive(store, "demo", "r1", ["size"], "another reason", "2099-01-01")
    promote(store, "demo", "r1", "staging")


def test_a_verdict_without_a_failed_gate_is_waived_as_such(store: Store, publish: Publish) -> None:
    publish(verdict="inconclusive", prepare=with_gates({**KL_GATE, "verdict": "passed"}))
    with pytest.raises(RefusedError, match="covers verdict"):
        promote(store, "demo", "r1", "staging")
    waive(store, "demo", "r1", ["verdict"], "a reason", "2099-01-01")
    promote(store, "demo", "r1", "staging")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gates": ["treshold"]}, 'Did you mean "threshold"'),
        ({"until": "2020-01-01"}, "is past"),
        ({"until": "soon"}, "not a date"),
        ({"until": "2099-01-01T10:00:00"}, "needs a zone"),
        ({"reason": "  "}, "say why"),
        ({"sign_with": Path("/nowhere/key")}, "no such key file"),
    ],
)
def test_mistakes_in_a_waiver_are_answered_with_help(
    store: Store, publish: Publish, changes: dict[str, object], says: str
) -> None:
    publish(verdict="failed", prepare=with_gates(KL_GATE))
    asked = {"gates": [KL], "reason": "a reason", "until": "2099-01-01", **changes}
    with pytest.raises(RecipeError, match=says):
        waive(store, "demo", "r1", **asked)  # type: ignore[arg-type]
    assert store.waivers("demo", "r1") == []


def test_a_gate_that_passed_has_nothing_to_waive(store: Store, publish: Publish) -> None:
    publish(verdict="failed", prepare=with_gates(KL_GATE, {**SIZE_GATE, "verdict": "passed"}))
    with pytest.raises(RecipeError, match="no gate of that name failed"):
        waive(store, "demo", "r1", ["size"], "a reason", "2099-01-01")


def test_a_version_that_passed_has_nothing_to_waive(store: Store, publish: Publish) -> None:
    publish(prepare=with_gates({**KL_GATE, "verdict": "passed"}))
    with pytest.raises(RecipeError, match="passed every gate"):
        waive(store, "demo", "v1", ["verdict"], "a reason", "2099-01-01")


def test_waivers_are_listed_for_ever(store: Store, publish: Publish) -> None:
    publish(verdict="failed", prepare=with_gates(KL_GATE))
    long_ago = datetime.now(UTC) - timedelta(days=400)
    waive(store, "demo", "r1", [KL], "first", f"{long_ago + timedelta(days=1):%Y-%m-%d}", now=long_ago)
    waive(store, "demo", "r1", [KL], "second", "2099-01-01")
    assert [(waiver.reason, waiver.expired()) for waiver in store.waivers("demo", "r1")] == [
        ("first", True),
        ("second", False),
    ]
    assert store.waivers("demo", "r2") == []


def test_an_edited_waiver_is_noticed(store: Store, publish: Publish) -> None:
    publish(verdict="failed", prepare=with_gates(KL_GATE))
    waive(store, "demo", "r1", [KL], "a reason", "2030-01-01")
    path = store.root / "demo" / "history.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"until":"2030', b'"until":"2099'))
    assert not audit(store).ok
    with pytest.raises(CompressError):
        promote(store, "demo", "r1", "staging")


# --- signatures -----------------------------------------------------------------------------------------------------


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "id_test"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "anna", "-f", path], check=True)
    return path


def allow(store: Store, key: Path, principal: str = "anna@example.org") -> None:
    public = key.with_name(f"{key.name}.pub").read_text()
    (store.root / "allowed_signers").write_text(f"{principal} {public}")


def test_a_signed_waiver_is_checked_against_allowed_signers(store: Store, publish: Publish, key: Path) -> None:
    publish(verdict="failed", prepare=with_gates(KL_GATE))
    given = waive(store, "demo", "r1", [KL], "a reason", "2099-01-01", sign_with=key)
    assert (given.signed_by or "").startswith("ssh SHA256:")
    assert "signature valid, signer not in allowed_signers" in "\n".join(audit(store).notes)
    allow(store, key)
    found = audit(store)
    assert found.ok and "signature valid, by anna@example.org" in "\n".join(found.notes)
    promote(store, "demo", "r1", "staging")


def test_where_signers_are_listed_nobody_else_can_waive(
    store: Store, publish: Publish, key: Path, tmp_path: Path
) -> None:
    publish(verdict="failed", prepare=with_gates(KL_GATE))
    waive(store, "demo", "r1", [KL], "before there was a list", "2099-01-01")
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    allow(store, other)
    with pytest.raises(RefusedError, match="not signed by anyone in allowed_signers"):
        promote(store, "demo", "r1", "staging")
    with pytest.raises(RecipeError, match="--sign-with KEY"):
        waive(store, "demo", "r1", [KL], "a reason", "2099-01-01")
    with pytest.raises(RecipeError, match="would not count"):
        waive(store, "demo", "r1", [KL], "a reason", "2099-01-01", sign_with=key)
    waive(store, "demo", "r1", [KL], "a reason", "2099-01-01", sign_with=other)
    promote(store, "demo", "r1", "staging")


def test_a_signature_over_other_words_is_bad(store: Store, publish: Publish, key: Path) -> None:
    """Somebody rewrites the last line, its digest and the head: the chain fits, the signature does not."""
    from compress.artifacts import history

    publish(verdict="failed", prepare=with_gates(KL_GATE))
    waive(store, "demo", "r1", [KL], "a reason", "2030-01-01", sign_with=key)
    home = store.root / "demo"
    line = store.history("demo").lines[-1]
    forged = line.model_copy(update={"waiver": {**(line.waiver or {}), "until": "2099-01-01T00:00:00Z"}})
    kept = (home / "history.jsonl").read_bytes().splitlines(keepends=True)[:-1]
    (home / "history.jsonl").write_bytes(b"".join(kept) + forged.text() + b"\n")
    (home / "history.head").write_text(
        json.dumps({"seq": line.seq, "sha256": forged.digest_of_line}, indent=1, sort_keys=True) + "\n"
    )
    assert history.read(home).problems == ()
    assert "signature does not fit" in "\n".join(audit(store).problems)
    with pytest.raises(RefusedError, match="signature does not fit"):
        promote(store, "demo", "r1", "staging")


def test_what_is_signed_can_be_checked_by_hand(store: Store, publish: Publish, key: Path, tmp_path: Path) -> None:
    publish(verdict="failed", prepare=with_gates(KL_GATE))
    waive(store, "demo", "r1", [KL], "für die Vorführung", "2099-01-01", sign_with=key)
    allow(store, key)
    line = json.loads((store.root / "demo" / "history.jsonl").read_text().splitlines()[-1])
    (tmp_path / "waiver.sig").write_text(line["signature"])
    data = json.dumps(line["waiver"], sort_keys=True, separators=(",", ":")).encode()
    command = ["ssh-keygen", "-Y", "verify", "-n", "compress-waiver", "-I", "anna@example.org"]
    command += ["-f", str(store.root / "allowed_signers"), "-s", str(tmp_path / "waiver.sig")]
    assert subprocess.run(command, input=data, capture_output=True).returncode == 0


def test_gpg_signs_and_checks(store: Store, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path("/tmp") / f"gpg-{os.getpid()}-{tmp_path.name[-8:]}"  # a socket's path must be short
    home.mkdir(mode=0o700)
    monkeypatch.setenv("GNUPGHOME", str(home))
    try:
        made = subprocess.run(
            ["gpg", "--batch", "--passphrase", "", "--quick-gen-key", "anna@example.org", "ed25519", "sign", "1d"],
            capture_output=True,
        )
        if made.returncode:
            pytest.skip(f"gpg makes no key here: {made.stderr.decode()[-200:]}")
        publish(verdict="failed", prepare=with_gates(KL_GATE))
        with pytest.raises(RecipeError, match="no such secret key"):
            waive(store, "demo", "r1", [KL], "a reason", "2099-01-01", gpg_key="tom@example.org")
        given = waive(store, "demo", "r1", [KL], "a reason", "2099-01-01", gpg_key="anna@example.org")
        assert "signature valid, by gpg" in "\n".join(audit(store).notes)
        promote(store, "demo", "r1", "staging")
        empty = home / "empty"
        empty.mkdir(mode=0o700)
        monkeypatch.setenv("GNUPGHOME", str(empty))
        found = audit(store)
        assert found.ok and f"{given.signed_by} is not in gpg's keyring" in "\n".join(found.notes)
    finally:
        subprocess.run(["gpgconf", "--kill", "all"], env={**os.environ, "GNUPGHOME": str(home)}, check=False)
        subprocess.run(["rm", "-rf", str(home)], check=True)
