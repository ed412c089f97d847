"""What may go and what must stay; removal is one rename, and a line for ever."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from compress.artifacts import collect as module
from compress.artifacts import manifest
from compress.artifacts.audit import audit
from compress.artifacts.collect import Rules, collect, read_age
from compress.artifacts.desk import promote, rollback, waive
from compress.artifacts.store import Store
from compress.errors import RecipeError

from .conftest import FACTS, KL_GATE, fill, overwrite, with_gates

Publish = Callable[..., Path]
MONTH = timedelta(days=30)
LATER = datetime.now(UTC) + timedelta(days=365)


def labels(store: Store, name: str = "demo") -> list[str]:
    return [version.label for version in store.versions(name)]


def test_the_newest_stay_and_the_others_go_with_a_line_each(store: Store, publish: Publish) -> None:
    for _ in range(4):
        publish()
    done = collect(store, Rules(keep=2), by="anna")
    assert [each.version.label for each in done.gone] == ["v0001", "v0002"]
    assert labels(store) == ["v0003", "v0004"]
    lines = store.history("demo").lines[-2:]
    assert [(line.event, line.version, line.who) for line in lines] == [
        ("collected", "v0001", "anna"),
        ("collected", "v0002", "anna"),
    ]
    assert os.listdir(store.root / ".staging") == []
    assert audit(store).ok
    assert publish().name == "v0005"


def test_old_rejected_runs_go_and_young_ones_stay(store: Store, publish: Publish) -> None:
    publish(verdict="failed")
    assert collect(store, Rules(rejected_older_than=MONTH)).gone == ()
    done = collect(store, Rules(rejected_older_than=MONTH), now=LATER)
    assert [each.version.label for each in done.gone] == ["r0001"]
    assert publish(verdict="failed").name == "r0002"
    assert audit(store).ok


def test_a_dry_run_removes_nothing(store: Store, publish: Publish) -> None:
    for _ in range(3):
        publish()
    assert len(collect(store, Rules(keep=1), dry_run=True).gone) == 2
    assert len(labels(store)) == 3
    assert [line.event for line in store.history("demo").lines] == ["published"] * 3


def test_what_channels_hold_and_would_go_back_to_stays(store: Store, publish: Publish) -> None:
    for _ in range(6):
        publish()
    for label in ("v1", "v2", "v3"):
        promote(store, "demo", label, "production")
    promote(store, "demo", "v4", "staging")
    done = collect(store, Rules(keep=1))
    assert labels(store) == ["v0002", "v0003", "v0004", "v0006"]
    assert {each.version.label: each.why for each in done.kept} == {
        "v0002": "production would go back to it",
        "v0003": "production holds it",
        "v0004": "staging holds it",
    }
    rollback(store, "demo", "production")
    assert audit(store).ok


def test_waived_runs_stay(store: Store, publish: Publish) -> None:
    for _ in range(2):
        publish(verdict="failed", prepare=with_gates(KL_GATE))
    waive(store, "demo", "r1", ["threshold"], "a reason", "2099-01-01", by="anna")
    collect(store, Rules(rejected_older_than=MONTH), now=LATER)
    assert labels(store) == ["r0001"]


def test_what_a_kept_version_was_made_from_stays_however_far_back(store: Store, publish: Publish) -> None:
    paths = [publish(), publish(), publish()]
    child = paths[0]
    for number in range(2):  # demo@v0001 -> first@v0001 -> second@v0001
        made = manifest.read(child)
        name = ("first", "second")[number]
        with store.staging(name) as staged:
            fill(staged, seed=number + 1)
            parent = {"reference": f"{made.name}@{made.version}", "digest": made.digest}
            child = store.publish(staged, name, "passed", {**FACTS, "parent": parent})
    done = collect(store, Rules(keep=1))
    assert labels(store) == ["v0001", "v0003"]
    assert [(each.version.reference, each.why) for each in done.kept] == [
        ("demo@v0001", "first@v0001 was made from it")
    ]


def test_only_the_name_asked_for_is_touched(store: Store, publish: Publish) -> None:
    for name in ("demo", "demo", "other", "other"):
        publish(name)
    collect(store, Rules(keep=1), name="other")
    assert (labels(store), labels(store, "other")) == (["v0001", "v0002"], ["v0002"])
    with pytest.raises(RecipeError, match='Did you mean "other"'):
        collect(store, Rules(keep=1), name="othr")


def test_freed_bytes_are_those_that_nobody_shares(store: Store, publish: Publish) -> None:
    first = publish()
    publish()
    freed = collect(store, Rules(keep=1)).freed
    assert freed < manifest.read(first).bytes if first.exists() else freed > 0
    publish(prepare=lambda folder: (folder / "recipe.yaml").write_bytes(bytes(5000)))
    publish()
    assert collect(store, Rules(keep=1)).freed >= 5000


def test_damaged_versions_and_names_with_a_damaged_history_stay(store: Store, publish: Publish) -> None:
    paths = [publish(), publish(), publish()]
    overwrite(paths[0] / "manifest.json", b"{")
    collect(store, Rules(keep=1))
    assert labels(store) == ["v0001", "v0003"]
    publish()
    path = store.root / "demo" / "history.jsonl"
    path.write_bytes(path.read_bytes().replace(b"published", b"publishes"))
    done = collect(store, Rules(keep=1))
    assert done.gone == () and {each.why for each in done.kept} == {"its history is damaged"}


@pytest.mark.parametrize(
    ("rules", "says"), [(Rules(), "say what may go"), (Rules(keep=0), "at least 1"), (Rules(keep=-1), "at least 1")]
)
def test_rules_that_make_no_sense_are_refused(store: Store, rules: Rules, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        collect(store, rules)


def test_ages_are_read_in_hours_days_and_weeks() -> None:
    assert [read_age(text) for text in ("12h", "30d", "2w")] == [timedelta(hours=12), MONTH, timedelta(days=14)]
    with pytest.raises(RecipeError, match="30d, 12h or 2w"):
        read_age("a month")


def test_a_removal_that_died_before_the_rename_is_abandoned(
    store: Store, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    publish()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        collect(store, Rules(keep=1))
    monkeypatch.undo()
    found = audit(store)
    assert found.ok and "line 3 (collected) was not carried out" in "\n".join(found.notes)
    promote(store, "demo", "v1", "production")
    assert [line.event for line in store.history("demo").lines][-2:] == ["abandoned", "promoted"]
    assert labels(store) == ["v0001", "v0002"]
    assert audit(store).ok
