"""What somebody changed behind the desk's back: refused, kept on record, and never covered up by the next command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from compress.artifacts import desk, history, manifest
from compress.artifacts.audit import audit, audit_channel
from compress.artifacts.desk import promote, rollback, waive
from compress.artifacts.lines import Draft
from compress.artifacts.store import Store
from compress.artifacts.transport import push
from compress.errors import CompressError, RecipeError

from .conftest import FACTS, KL_GATE, SIZE_GATE, fill, overwrite, with_gates

Publish = Callable[..., Path]
KL = "threshold:divergence.held-out.mean_kl"
LATER = datetime(2035, 1, 1, tzinfo=UTC)
NOT_UTF8 = b"an\xffna".decode("utf-8", "surrogateescape")


def replace_by_other_bytes(path: Path, **changes: object) -> None:
    """Other weights under the same label, with a manifest that fits them."""
    made = manifest.read(path)
    shutil.rmtree(path)
    fill(path, seed=77)
    built = manifest.build(
        path,
        name=made.name,
        version=made.version,
        verdict=made.verdict,
        lineage=made.lineage,
        environment=made.environment,
        history=made.history,
    )
    (path / "manifest.json").write_text(manifest.to_text(built))


def cut(home: Path, lines: int) -> None:
    """Remove the lines after `lines`, and make the head fit what is left."""
    path = home / history.HISTORY_NAME
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))
    pin = {"seq": lines, "sha256": history.read(home).ends[-1]}
    (home / history.HEAD_NAME).write_text(json.dumps(pin, indent=1, sort_keys=True) + "\n")
    assert history.read(home).problems == ()


# --- words ----------------------------------------------------------------------------------------------------------


def test_a_byte_that_is_no_utf8_is_refused_before_anything_is_written(store: Store, publish: Publish) -> None:
    publish()
    publish(verdict="failed", prepare=with_gates(KL_GATE))
    before = (store.root / "demo" / history.HISTORY_NAME).read_bytes()
    for action in (
        lambda: promote(store, "demo", "v1", "production", by=NOT_UTF8),
        lambda: promote(store, "demo", "v1", "production", note=NOT_UTF8),
        lambda: rollback(store, "demo", "production", to="v1", by=NOT_UTF8),
        lambda: waive(store, "demo", "r1", [KL], NOT_UTF8, "2099-01-01"),
        lambda: waive(store, "demo", "r1", [KL], "a reason", "2099-01-01", by=NOT_UTF8),
        lambda: push(store, "demo", str(store.root.parent / NOT_UTF8)),
        lambda: push(store, "demo", str(store.root.parent / "remote"), by=NOT_UTF8),
    ):
        with pytest.raises(RecipeError, match=r"an\\udcffna.*not UTF-8"):
            action()
    assert (store.root / "demo" / history.HISTORY_NAME).read_bytes() == before
    assert not (store.root.parent / "remote").exists()


def test_a_login_name_that_is_no_utf8_is_mended(
    store: Store, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", NOT_UTF8)
    publish()
    promote(store, "demo", "v1", "production")
    assert {line.who for line in store.history("demo").lines} == {"an\ufffdna"}
    assert audit(store).ok


def test_a_line_that_could_not_be_read_back_is_not_written(store: Store, publish: Publish) -> None:
    publish()
    before = (store.root / "demo" / history.HISTORY_NAME).read_bytes()
    with store.locked("demo") as past, pytest.raises(CompressError, match="could not be read back"):
        history.append(store.root / "demo", past, [Draft(event="exported", who="anna", detail=NOT_UTF8)])
    assert (store.root / "demo" / history.HISTORY_NAME).read_bytes() == before


# --- other bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
def test_a_version_that_was_replaced_by_sound_bytes_is_not_released(
    store: Store, publish: Publish, tmp_path: Path, quick: bool
) -> None:
    paths = [publish(), publish()]
    promote(store, "demo", "v2", "production")
    promote(store, "demo", "v1", "production")
    replace_by_other_bytes(paths[1])
    for action in (
        lambda: promote(store, "demo", "v2", "staging", quick=quick),
        lambda: rollback(store, "demo", "production", quick=quick),
        lambda: rollback(store, "demo", "production", to="v2", quick=quick),
        lambda: push(store, "demo@v2", str(tmp_path / "remote")),
    ):
        with pytest.raises(CompressError, match="is not the version of line 2 of the history") as raised:
            action()
        assert raised.value.exit_code == 1
    assert not (tmp_path / "remote").exists()


def test_a_version_of_which_no_line_tells_is_not_released(store: Store, publish: Publish, tmp_path: Path) -> None:
    publish()
    other = Store(tmp_path / "other")
    for seed in (1, 2):
        with other.staging("demo") as staged:
            fill(staged, seed)
            made = other.publish(staged, "demo", "passed", FACTS)
    shutil.copytree(made, store.root / "demo" / "v0002")
    for label in ("v1", "v2"):
        with pytest.raises(CompressError, match=r"v0002/manifest\.json remembers line 1"):
            promote(store, "demo", label, "production")
    shutil.rmtree(store.root / "demo" / "v0002")
    promote(store, "demo", "v1", "production")
    assert audit(store).ok and "(settled since)" in "\n".join(audit(store).notes)


# --- a history that was cut -----------------------------------------------------------------------------------------


def test_what_a_channel_remembers_of_a_cut_history_stays_on_record(store: Store, publish: Publish) -> None:
    publish()
    publish()
    publish(verdict="failed", prepare=with_gates(KL_GATE))
    publish()
    waive(store, "demo", "r1", [KL], "a reason", "2099-01-01")
    promote(store, "demo", "r1", "production")
    promote(store, "demo", "v2", "production")
    home = store.root / "demo"
    cut(home, 4)
    for _ in range(2):
        with pytest.raises(CompressError, match=r"production\.json remembers line 7, which is not in this history"):
            promote(store, "demo", "v3", "production")
    publish()
    broken = [line for line in store.history("demo").lines if line.event == "broken"]
    assert len(broken) == 1
    with pytest.raises(CompressError, match="--to"):
        rollback(store, "demo", "production")
    rollback(store, "demo", "production", to="v2")
    assert "production.json remembers line 7" in "\n".join(audit(store).problems)
    assert audit_channel(store, "demo", "production").ok
    with pytest.raises(CompressError, match="remembers line 7"):
        promote(store, "demo", "v3", "production")


def test_a_history_that_was_taken_away_stops_promotions(store: Store, publish: Publish) -> None:
    publish()
    publish()
    home = store.root / "demo"
    for name in (history.HISTORY_NAME, history.HEAD_NAME):
        (home / name).unlink()
    with pytest.raises(CompressError, match=r"v0002/manifest\.json remembers line 1"):
        promote(store, "demo", "v1", "production")
    assert not (home / "channels").exists()
    assert not audit(store).ok


def test_a_rewritten_chain_contradicts_the_newest_manifest(store: Store, publish: Publish) -> None:
    """Line 1 is forged and every line after it chained anew, with a head that fits."""
    publish()
    publish()
    home = store.root / "demo"
    lines = store.history("demo").lines
    drafts = [Draft.model_validate(line.model_dump(exclude={"seq", "at", "previous"})) for line in lines]
    forged = history.chained(
        history.History(home).pin, [drafts[0].model_copy(update={"who": "eve"}), *drafts[1:]], lines[0].at
    )
    (home / history.HISTORY_NAME).write_bytes(b"".join(line.text() + b"\n" for line in forged))
    cut(home, 2)
    with pytest.raises(CompressError, match=r"v0002/manifest\.json remembers line 1"):
        promote(store, "demo", "v1", "production")
    assert "remembers a history" in "\n".join(audit(store).problems)


@pytest.mark.parametrize("change", ["edit", "remove", "garble"])
def test_a_changed_channel_stops_promotions_until_somebody_names_a_version(
    store: Store, publish: Publish, change: str
) -> None:
    publish()
    publish()
    promote(store, "demo", "v1", "production")
    publish()  # right after a promotion, a file that is gone looks like a crash
    path = store.root / "demo" / "channels" / "production.json"
    if change == "remove":
        path.unlink()
    else:
        path.write_text(path.read_text().replace("v0001", "v0002") if change == "edit" else "{")
    for _ in range(2):
        with pytest.raises(CompressError, match=r"line 5 records that channels/production\.json"):
            promote(store, "demo", "v2", "production")
    with pytest.raises(CompressError, match="--to"):
        rollback(store, "demo", "production")
    rollback(store, "demo", "production", to="v1")
    assert audit(store).ok and "settled since" in "\n".join(audit(store).notes)
    promote(store, "demo", "v2", "production")
    assert [line.event for line in store.history("demo").lines][4:] == ["broken", "rolled_back", "promoted"]


def test_a_channel_that_a_crash_left_behind_is_no_contradiction(store: Store, publish: Publish) -> None:
    publish()
    publish()
    promote(store, "demo", "v1", "production")
    path = store.root / "demo" / "channels" / "production.json"
    before = path.read_bytes()
    promote(store, "demo", "v2", "production")
    path.write_bytes(before)
    assert audit_channel(store, "demo", "production").ok
    promote(store, "demo", "v2", "production")
    assert "broken" not in {line.event for line in store.history("demo").lines}
    assert audit(store).ok


# --- what a deploy job asks -----------------------------------------------------------------------------------------


def test_verify_of_a_channel_compares_it_with_its_line(store: Store, publish: Publish) -> None:
    publish()
    path = publish()
    promote(store, "demo", "v2", "production")
    assert audit_channel(store, "demo", "production").ok
    replace_by_other_bytes(path)
    problems = "\n".join(audit_channel(store, "demo", "production").problems)
    assert "line 3 of the history put v0002 there with the digest" in problems


def test_verify_of_an_edited_channel_says_so(store: Store, publish: Publish) -> None:
    publish()
    publish()
    promote(store, "demo", "v2", "production")
    path = store.root / "demo" / "channels" / "production.json"
    content = json.loads(path.read_text())
    content |= {"version": "v0001", "path": "demo/v0001"}
    path.write_text(json.dumps(content, indent=2) + "\n")
    assert "is not what line 3" in "\n".join(audit_channel(store, "demo", "production").problems)


def test_what_an_edited_channel_names_is_not_pushed(store: Store, publish: Publish, tmp_path: Path) -> None:
    publish()
    publish()
    promote(store, "demo", "v2", "production")
    push(store, "demo@production", str(tmp_path / "whole"))
    path = store.root / "demo" / "channels" / "production.json"
    path.write_text(path.read_text().replace("v0002", "v0001"))
    with pytest.raises(CompressError, match="is not what line 3"):
        push(store, "demo@production", str(tmp_path / "edited"))
    assert not (tmp_path / "edited").exists()


# --- waivers --------------------------------------------------------------------------------------------------------


def test_what_waivers_cover_now_can_be_asked(store: Store, publish: Publish) -> None:
    publish(verdict="failed", prepare=with_gates(KL_GATE, SIZE_GATE))
    publish()
    assert desk.uncovered(store, "demo", "r1") == ["size:weight_bytes", KL]
    assert desk.uncovered(store, "demo", "v1") == [] == desk.counting(store, "demo", "v1")
    first = waive(store, "demo", "r1", [KL], "a reason", "2030-01-31")
    second = waive(store, "demo", "r1", ["size"], "a reason", "2099-01-31")
    assert desk.counting(store, "demo", "r0001") == [first, second]
    assert desk.uncovered(store, "demo", "r0001") == []
    assert desk.counting(store, "demo", "r1", now=LATER) == [second]
    assert desk.uncovered(store, "demo", "r1", now=LATER) == [KL]
    promote(store, "demo", "r1", "staging")
    assert "count no more for threshold:divergence" in "\n".join(audit(store, now=LATER).notes)


def test_an_unsigned_waiver_does_not_count_where_signers_are_listed(store: Store, publish: Publish) -> None:
    publish(verdict="failed", prepare=with_gates(KL_GATE))
    given = waive(store, "demo", "r1", [KL], "a reason", "2099-01-31")
    assert desk.why_not(store, given) == ""
    (store.root / "allowed_signers").write_text("")
    assert desk.counting(store, "demo", "r1") == []
    assert "not signed by anyone" in desk.why_not(store, given)


def test_allowed_signers_that_are_a_folder_let_nobody_waive(store: Store, publish: Publish) -> None:
    publish(verdict="failed", prepare=with_gates(KL_GATE))
    waive(store, "demo", "r1", [KL], "a reason", "2099-01-31")
    (store.root / "allowed_signers").mkdir()
    for action in (
        lambda: promote(store, "demo", "r1", "staging"),
        lambda: waive(store, "demo", "r1", [KL], "a reason", "2099-01-31"),
    ):
        with pytest.raises(CompressError, match="not a plain file"):
            action()
    assert "not a plain file" in "\n".join(audit(store).problems)


@pytest.mark.parametrize(
    ("until", "says"),
    [
        ("9999-12-31T23:59:59-23:00", "after the year 9999"),
        ("20270131", "not a date; write it as 2027-01-31"),
        ("2027-W05-7", "not a date"),
        ("2099-01-31T10:00:00", "needs a zone"),
    ],
)
def test_ends_that_are_none_are_answered_with_help(store: Store, publish: Publish, until: str, says: str) -> None:
    publish(verdict="failed", prepare=with_gates(KL_GATE))
    with pytest.raises(RecipeError, match=says):
        waive(store, "demo", "r1", [KL], "a reason", until)


def test_all_mistakes_of_a_waiver_are_told_together(store: Store, publish: Publish) -> None:
    publish(verdict="failed", prepare=with_gates(KL_GATE))
    with pytest.raises(RecipeError) as raised:
        waive(store, "demo", "r1", ["treshold"], " ", "soon", by=NOT_UTF8, sign_with=Path("/nowhere/key"))
    assert [mistake.split()[0] for mistake in raised.value.mistakes] == [
        "--by",
        "--gate",
        "--until",
        "--reason:",
        "--sign-with",
    ]


def test_rollback_at_the_bottom_names_what_the_channel_held(store: Store, publish: Publish) -> None:
    for number in (1, 2, 3):
        publish()
        promote(store, "demo", f"v{number}", "production")
    rollback(store, "demo", "production")
    rollback(store, "demo", "production")
    with pytest.raises(RecipeError, match=r"back at v0001.*v0002, v0003 after that: name another with --to"):
        rollback(store, "demo", "production")


def test_damage_outside_the_manifest_does_not_pass_as_a_replaced_version(store: Store, publish: Publish) -> None:
    path = publish()
    promote(store, "demo", "v1", "production")
    overwrite(path / "recipe.yaml", b"schema: 2\n")
    assert "recipe.yaml" in "\n".join(audit_channel(store, "demo", "production").problems)
