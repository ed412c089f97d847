"""The chain of events: every edit is noticed, every crash is mended, and numbers never come back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.artifacts import history, manifest
from compress.artifacts.audit import audit
from compress.artifacts.desk import promote, rollback
from compress.artifacts.store import Store
from compress.errors import CompressError, RecipeError

from .conftest import FACTS, fill

Publish = Callable[..., Path]


def events(store: Store, name: str = "demo") -> list[tuple[str, str | None]]:
    return [(line.event, line.version) for line in store.history(name).lines]


@pytest.fixture
def told(store: Store, publish: Publish) -> Path:
    """A history of six lines; the folder of its name."""
    publish()
    publish(verdict="failed")
    publish()
    promote(store, "demo", "v1", "production", by="anna")
    promote(store, "demo", "v2", "production", by="tom")
    rollback(store, "demo", "production", by="anna")
    return store.root / "demo"


def test_every_event_is_a_line_that_carries_the_digest_of_the_one_before(store: Store, told: Path) -> None:
    past = store.history("demo")
    assert events(store) == [
        ("published", "v0001"),
        ("rejected", "r0001"),
        ("published", "v0002"),
        ("promoted", "v0001"),
        ("promoted", "v0002"),
        ("rolled_back", "v0001"),
    ]
    assert [line.previous for line in past.lines] == [history.ZERO, *past.ends[:-1]]
    assert past.lines[2].digest == manifest.read(told / "v0002").digest
    assert past.lines[4].who == "tom"
    assert past.problems == ()
    assert audit(store).problems == ()


def test_any_flipped_bit_of_history_or_head_is_noticed(store: Store, told: Path) -> None:
    for name in (history.HISTORY_NAME, history.HEAD_NAME):
        path = told / name
        content = path.read_bytes()
        for position in range(0, len(content), 1 if name == history.HEAD_NAME else 7):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            found = audit(store)
            assert any(history.HISTORY_NAME in problem for problem in found.problems), (name, position)
        path.write_bytes(content)
    assert audit(store).ok


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: lines[:-1], "line 6 is gone"),
        (lambda lines: lines[:2], "line 6 is gone"),
        (lambda lines: [lines[0], *lines[2:]], "lines were removed or moved"),
        (lambda lines: lines[1:], "line 1 says it is line 2"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "lines were removed or moved"),
        (lambda lines: [*lines[:3], lines[3].replace(b"anna", b"eve0"), *lines[4:]], "does not follow line 4"),
        (lambda lines: [*lines[:5], lines[5].replace(b"anna", b"eve0")], "line 6 is not the one that was there"),
        (lambda lines: [], "line 6 is gone"),
    ],
    ids=["last", "tail", "middle", "first", "swapped", "edited", "edited last", "all"],
)
def test_removed_moved_and_edited_lines_are_noticed(
    store: Store, told: Path, change: Callable[[list[bytes]], list[bytes]], says: str
) -> None:
    path = told / history.HISTORY_NAME
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    assert says in "\n".join(audit(store).problems)


def test_a_truncated_history_with_a_forged_head_contradicts_the_channel(store: Store, told: Path) -> None:
    path = told / history.HISTORY_NAME
    lines = path.read_bytes().splitlines(keepends=True)[:-1]
    path.write_bytes(b"".join(lines))
    last = store.history("demo").ends[-1]
    (told / history.HEAD_NAME).write_text(json.dumps({"seq": 5, "sha256": last}, indent=1) + "\n")
    assert store.history("demo").problems == ()
    assert [problem for problem in audit(store).problems if "production.json: is not what line 5" in problem]


def test_a_removed_history_contradicts_the_manifests(store: Store, told: Path) -> None:
    (told / history.HISTORY_NAME).unlink()
    (told / history.HEAD_NAME).unlink()
    shutil.rmtree(told / "channels")
    problems = "\n".join(audit(store).problems)
    assert "demo/v0002: no line tells of it" in problems and "line 2 is gone" in problems


def test_what_a_damaged_head_said_stays_on_record(store: Store, told: Path, publish: Publish) -> None:
    path = told / history.HISTORY_NAME
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    publish()
    assert "broken" in [event for event, _ in events(store)]
    assert "records that line 6 is gone" in "\n".join(audit(store).problems)
    with pytest.raises(CompressError, match="verify --all"):
        promote(store, "demo", "v3", "staging")


def test_a_deleted_version_is_noticed(store: Store, told: Path) -> None:
    shutil.rmtree(told / "v0002")
    assert "demo/v0002: line 3 of the history says published, but it is gone" in audit(store).problems


def test_a_version_replaced_by_another_sound_one_is_noticed(store: Store, told: Path) -> None:
    other = Store(store.root.parent / "other")
    for seed in (5, 6):
        with other.staging("demo") as staged:
            fill(staged, seed)
            made = other.publish(staged, "demo", "passed", FACTS)
    shutil.rmtree(told / "v0002")
    shutil.copytree(made, told / "v0002")
    assert "demo/v0002: is not the version of line 3" in "\n".join(audit(store).problems)


# --- crashes --------------------------------------------------------------------------------------------------------


def test_a_version_without_its_line_gets_one_marked_as_recovered(store: Store, publish: Publish) -> None:
    publish()
    before = [(store.root / "demo" / name).read_bytes() for name in (history.HISTORY_NAME, history.HEAD_NAME)]
    publish()
    for name, content in zip((history.HISTORY_NAME, history.HEAD_NAME), before, strict=True):
        (store.root / "demo" / name).write_bytes(content)
    found = audit(store)
    assert found.problems == () and "v0002: no line of the history tells of it yet" in "\n".join(found.notes)
    publish()
    assert events(store) == [("published", "v0001"), ("published", "v0002"), ("published", "v0003")]
    assert [line.recovered for line in store.history("demo").lines] == [None, True, None]
    assert audit(store).notes == ()


def test_a_store_older_than_its_history_gets_one(store: Store, publish: Publish) -> None:
    for _ in range(2):
        path = publish()
        made = manifest.read(path).model_copy(update={"history": None})
        (path / "manifest.json").unlink()
        whole = made.model_copy(update={"digest": made.recomputed_digest()})
        (path / "manifest.json").write_text(manifest.to_text(whole))
        (store.root / "demo" / history.HISTORY_NAME).unlink()
        (store.root / "demo" / history.HEAD_NAME).unlink()
    assert audit(store).problems == ()
    promote(store, "demo", "v1", "staging")
    assert events(store) == [("published", "v0001"), ("published", "v0002"), ("promoted", "v0001")]
    assert audit(store).ok


def test_a_torn_last_line_is_cut_off_and_said_so(store: Store, told: Path, publish: Publish) -> None:
    path = told / history.HISTORY_NAME
    with path.open("ab") as stream:
        stream.write(b'{"at":"2026-')
    found = audit(store)
    assert found.problems == () and "written to half" in "\n".join(found.notes)
    publish()
    assert events(store)[-2:] == [("repaired", None), ("published", "v0003")]
    assert audit(store).ok


def test_a_head_that_lags_behind_is_a_crash_and_no_problem(store: Store, told: Path, publish: Publish) -> None:
    head = (told / history.HEAD_NAME).read_bytes()
    publish()
    (told / history.HEAD_NAME).write_bytes(head)
    assert audit(store).ok
    publish()
    assert audit(store).ok


def test_a_promotion_that_was_not_carried_out_is_abandoned_by_the_next(
    store: Store, told: Path, publish: Publish
) -> None:
    channel = told / "channels" / "production.json"
    before = channel.read_bytes()
    promote(store, "demo", "v2", "production")
    channel.write_bytes(before)
    found = audit(store)
    assert found.problems == () and "line 7 (promoted) was not carried out" in "\n".join(found.notes)
    publish()
    assert events(store)[-2:] == [("abandoned", "v0002"), ("published", "v0003")]
    assert channel.read_bytes() == before
    assert audit(store).ok


def test_numbers_of_the_history_are_never_given_out_again(store: Store, publish: Publish) -> None:
    publish()
    shutil.rmtree(publish())
    assert store.predict_next_version("demo") == "v0003"
    assert publish().name == "v0003"


def test_a_head_that_was_taken_away_is_noticed(store: Store, publish: Publish) -> None:
    publish()
    (store.root / "demo" / history.HEAD_NAME).unlink()
    assert audit(store).problems == ("demo/history.jsonl: history.head is missing beside 1 lines",)


@pytest.mark.parametrize("name", [history.HISTORY_NAME, history.HEAD_NAME, ".lock"])
def test_a_file_that_is_a_link_is_refused_before_anything_is_written(
    store: Store, publish: Publish, tmp_path: Path, name: str
) -> None:
    publish()
    outside = tmp_path / "outside"
    (store.root / "demo" / name).rename(outside)
    (store.root / "demo" / name).symlink_to(outside)
    before = outside.read_bytes()
    with pytest.raises(RecipeError, match="is a link"):
        publish()
    with pytest.raises(RecipeError, match="is a link"):
        promote(store, "demo", "v1", "staging")
    assert outside.read_bytes() == before
    assert [version.label for version in store.versions("demo")] == ["v0001"]


def test_leftovers_of_a_killed_writer_are_removed(store: Store, told: Path, publish: Publish) -> None:
    leftovers = [told / ".history.head.99.tmp", told / "channels" / ".staging.json.99.tmp"]
    for path in leftovers:
        path.write_text("{")
    assert audit(store).ok
    publish()
    assert not any(path.exists() for path in leftovers)
