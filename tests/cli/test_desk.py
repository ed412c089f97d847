"""The release desk at the command line: promote, rollback, waive, history, diff, push, pull, gc, verify --all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.artifacts.store import Store
from tests.artifacts.conftest import overwrite
from tests.helpers import Ended

KL = "threshold:divergence.held-out.mean_kl"
Desk = Callable[..., Ended]


@pytest.fixture
def store(published, rejected, tmp_path) -> Path:
    """glass-int4@v0001, which passed, and glass-int4@r0001, whose gate failed."""
    folder = Path(shutil.copytree(published[0], tmp_path / "store"))
    shutil.copytree(rejected[0] / "glass-int4" / "rejected", folder / "glass-int4" / "rejected")
    for name in ("history.jsonl", "history.head"):
        (folder / "glass-int4" / name).unlink()
    return folder


@pytest.fixture
def desk(here, store) -> Desk:
    return lambda *arguments: here(*arguments, "--store", store)


def document(ended: Ended) -> Any:
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def test_promote_writes_the_file_that_a_deploy_job_reads(desk, store):
    printed = document(desk("promote", "glass-int4", "v1", "--to", "production", "--by", "anna", "--json"))

    read = json.loads((store / "glass-int4" / "channels" / "production.json").read_text())
    assert (store / read["path"] / "model" / "model.safetensors").is_file()
    assert printed["version"] == read["version"] == "v0001"
    assert (printed["before"], printed["changed"], printed["by"]) == (None, True, "anna")
    (row,) = [row for row in document(desk("list", "--json")) if row["version"] == "v0001"]
    assert row["channels"] == ["production"]
    assert desk("show", "glass-int4@production").code == 0
    assert "holds v0001 already" in desk("promote", "glass-int4@v0001", "--to", "production").out


def test_a_rejected_run_is_refused_waived_and_then_promoted(desk):
    refused = desk("promote", "glass-int4", "r1", "--to", "staging")
    assert refused.code == 3
    assert "compress waive glass-int4 r0001 --gate " + KL in refused.err
    assert "divergence.held-out.mean_kl is" in refused.err

    until = "2099-01-31"
    waived = document(
        desk("waive", "glass-int4@r1", "--gate", "threshold", "--reason", "for a test", "--until", until, "--json")
    )
    assert (waived["gates"], waived["signed_by"], waived["expired"]) == ([KL], None, False)
    assert "for a test" in desk("promote", "glass-int4", "r1", "--to", "staging").out
    assert document(desk("waivers", "glass-int4", "--json"))[0]["reason"] == "for a test"
    assert "2099-01-31" in desk("waivers", "glass-int4", "r1").out
    assert "was ever waived" in desk("waivers", "glass-int4", "v1").out


def test_rollback_is_one_command(desk, store):
    desk("waive", "glass-int4@r1", "--gate", KL, "--reason", "for a test", "--until", "2099-01-31")
    desk("promote", "glass-int4", "r1", "--to", "production")
    desk("promote", "glass-int4", "v1", "--to", "production")

    ended = desk("rollback", "glass-int4", "--channel", "production", "--note", "v1 was slow")

    assert ended.code == 0 and "holds r0001 now; before: v0001" in ended.out
    told = document(desk("history", "glass-int4", "--json"))
    assert told["ok"] and told["lines"][-1]["note"] == "v1 was slow"
    assert [line["event"] for line in told["lines"]][-3:] == ["promoted", "promoted", "rolled_back"]
    again = desk("rollback", "glass-int4", "--channel", "production")
    assert again.code == 2 and "name another with --to" in again.err


def test_a_damaged_version_is_not_promoted_and_not_gone_back_to(desk, store):
    overwrite(store / "glass-int4" / "v0001" / "recipe.yaml", b"schema: 1\n")

    ended = desk("promote", "glass-int4", "v1", "--to", "production", "--json")

    assert ended.code == 1
    assert "recipe.yaml" in json.loads(ended.out)["error"]["messages"][0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("promote", "glass-int4", "v1", "--to", "prod"), 'Did you mean "production"'),
        (("promote", "glass-int4", "v9", "--to", "staging"), "newest is"),
        (("promote", "glas-int4", "v1", "--to", "staging"), 'Did you mean "glass-int4"'),
        (("promote", "glass-int4", "--to", "staging"), "which version of glass-int4"),
        (("promote", "glass-int4@v1", "r1", "--to", "staging"), "name one version"),
        (("promote", "../glass-int4", "v1", "--to", "staging"), "cannot name an artifact"),
        (("promot", "glass-int4", "v1", "--to", "staging"), "promote"),
        (("rollback", "glass-int4", "--channel", "production"), "nothing of glass-int4 was ever promoted"),
        (("history", "glas-int4"), 'Did you mean "glass-int4"'),
        (("waivers", "glas-int4"), 'Did you mean "glass-int4"'),
        (("verify",), "one ARTIFACT, or --all"),
        (("verify", "glass-int4", "--all"), "one ARTIFACT, or --all"),
        (("gc", "--artifacts"), "say what may go"),
        (("gc", "--artifacts", "--rejected-older-than", "old"), "30d, 12h or 2w"),
        (("gc", "--keep", "3"), "add --artifacts"),
        (("push", "glass-int4", "s4://bucket"), 'Did you mean "s3"'),
        (("pull", "glass-int4"), "URL/NAME@v0003"),
        (("diff", "glass-int4@v1", "glass-int4@v7"), "newest is"),
    ],
)
def test_mistakes_end_with_2_and_help(desk, arguments, says):
    ended = desk(*arguments)

    assert ended.code == 2, ended.err
    assert says in ended.err


def test_gc_of_a_store_that_is_not_there_is_a_mistake(here, tmp_path):
    ended = here("gc", "--artifacts", "--keep", "1", "--store", tmp_path / "nowhere")

    assert ended.code == 2 and "there is no store" in ended.err


def test_verify_all_counts_a_whole_store_and_names_what_is_not(desk, store, here, tmp_path):
    assert "whole. 1 names, 2 versions" in desk("verify", "--all").out
    desk("promote", "glass-int4", "v1", "--to", "production")
    checked = document(desk("verify", "--all", "--json"))
    assert (checked["ok"], checked["versions"], checked["problems"]) == (True, 2, [])

    channel = store / "glass-int4" / "channels" / "production.json"
    channel.write_text(channel.read_text().replace("v0001", "v0002"))
    overwrite(store / "glass-int4" / "v0001" / "recipe.yaml", b"schema: 1\n")
    ended = desk("verify", "--all", "--json")

    assert ended.code == 1
    problems = "\n".join(json.loads(ended.out)["problems"])
    assert "glass-int4/channels/production.json" in problems and "glass-int4/v0001/recipe.yaml" in problems
    assert "error: glass-int4/v0001/recipe.yaml" in desk("verify", "--all").err
    assert here("verify", "--all", "--store", tmp_path / "nowhere").code == 2


def test_history_with_a_removed_line_ends_with_1(desk, store):
    desk("promote", "glass-int4", "v1", "--to", "production")
    path = store / "glass-int4" / "history.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))

    ended = desk("history", "glass-int4")

    assert ended.code == 1 and "line 3 is gone" in ended.err
    assert desk("history", "glass-int4", "--json").code == 1


def test_the_end_of_a_history_can_be_asked_for(desk):
    desk("promote", "glass-int4", "v1", "--to", "production")

    assert [line["seq"] for line in document(desk("history", "glass-int4", "--last", "2", "--json"))["lines"]] == [2, 3]
    assert desk("history", "glass-int4", "--last", "1").out.count("production held nothing") == 1
    assert "published" not in desk("history", "glass-int4", "--last", "1").out
    assert desk("history", "glass-int4", "--last", "0").code == 2


def test_diff_shows_recipe_measurements_gates_layers_and_sizes(desk):
    found = document(desk("diff", "glass-int4@v1", "glass-int4@r1", "--json"))

    assert found["same_model"] is True
    assert {"gates.0.kind"} <= {field["name"] for field in found["recipe"]}
    assert found["layers"]["compared"] == 28 and found["layers"]["schemes"] == []
    kl = next(each for each in found["measurements"] if each["name"] == "divergence.held-out.mean_kl")
    assert kl["difference"] == 0 and kl["apart"] is False
    told = desk("diff", "glass-int4@v1", "glass-int4@r1").out
    for part in ("byte for byte", "recipe", "measurements", "gates", "layers: 28 in both", "sizes", KL):
        assert part in told


def test_push_and_pull(desk, here, tmp_path):
    pushed = document(desk("push", "glass-int4@v1", tmp_path / "remote", "--json"))
    assert pushed["skipped"] == 0 and pushed["copied"] > 5
    assert "files were there already" in desk("push", "glass-int4@v1", tmp_path / "remote").out

    pulled = here("pull", f"{tmp_path}/remote/glass-int4@v1", "--store", tmp_path / "other", "--json")

    assert document(pulled)["digest"] == pushed["digest"]
    assert here("verify", "glass-int4@v1", "--store", tmp_path / "other").code == 0
    assert here("verify", "--all", "--store", tmp_path / "other").code == 0
    missing = desk("push", "glass-int4@v1", "gs://bucket/models", "--json")
    assert missing.code == 7 and "gcsfs" in json.loads(missing.out)["error"]["messages"][0]


def test_gc_of_artifacts_says_what_goes_and_what_stays(desk, store):
    opened = Store(store)
    with opened.staging("glass-int4") as staged:
        shutil.copytree(store / "glass-int4" / "v0001", staged, dirs_exist_ok=True)
        (staged / "manifest.json").unlink()
        opened.publish(staged, "glass-int4", "passed", {})
    desk("promote", "glass-int4", "v1", "--to", "production")

    kept = desk("gc", "--artifacts", "--keep", "1")
    assert "glass-int4@v0001 stays: production holds it" in kept.err and "in 0 versions" in kept.out
    desk("promote", "glass-int4", "v2", "--to", "staging")
    would = document(desk("gc", "--artifacts", "--rejected-older-than", "0h", "--dry-run", "--json"))
    assert [each["reference"] for each in would["removed"]] == ["glass-int4@r0001"]
    assert document(desk("gc", "--artifacts", "--rejected-older-than", "0h", "--json"))["removed"] == would["removed"]
    assert [version.label for version in opened.versions("glass-int4")] == ["v0001", "v0002"]
    assert document(desk("history", "glass-int4", "--json"))["lines"][-1]["event"] == "collected"
    assert "shared" in desk("list", "--shared").out
    assert desk("verify", "--all").code == 0


def test_a_waiver_is_signed_and_checked(desk, store, tmp_path):
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    asked = ("waive", "glass-int4@r1", "--gate", KL, "--reason", "for a test", "--until", "2099-01-31")

    assert "signed by ssh SHA256:" in desk(*asked, "--sign-with", key).out
    assert "signer not in allowed_signers" in desk("verify", "--all").err
    (store / "allowed_signers").write_text(f"anna@example.org {key.with_suffix('.pub').read_text()}")
    assert "signature valid, by anna@example.org" in desk("verify", "--all").err
    assert desk(*asked).code == 2


def test_a_byte_that_is_no_utf8_ends_with_2_and_the_history_stays_whole(desk, store):
    odd = os.fsdecode(b"an\xffna")
    desk("promote", "glass-int4", "v1", "--to", "staging")

    for asked in (
        ("promote", "glass-int4", "v1", "--to", "production", "--by", odd),
        ("promote", "glass-int4", "v1", "--to", "production", "--note", odd),
        ("waive", "glass-int4@r1", "--gate", KL, "--reason", odd, "--until", "2099-01-31"),
        ("push", "glass-int4@v1", store.parent / odd),
        ("pull", f"{store.parent / odd}/glass-int4@v1"),
    ):
        ended = desk(*asked)
        assert (ended.code, "not UTF-8" in ended.err) == (2, True), ended.err

    assert desk("history", "glass-int4").code == 0
    assert desk("verify", "--all").code == 0


def test_control_characters_do_not_reach_the_terminal(desk):
    odd = "a\x1b[31mred\u202e\nline 9"
    desk("waive", "glass-int4@r1", "--gate", KL, "--reason", odd, "--until", "2099-01-31", "--by", odd)
    told = [
        desk("promote", "glass-int4", "r1", "--to", "staging", "--note", odd),
        desk("history", "glass-int4"),
        desk("waivers", "glass-int4"),
        desk("verify", "--all"),
    ]

    for ended in told:
        assert ended.code == 0 and "\x1b" not in ended.out + ended.err and "\u202e" not in ended.out + ended.err
    assert r"a\x1b[31mred" in told[1].out and r"a\x1b[31mred" in told[2].out


def test_verify_of_a_channel_says_when_it_is_not_what_was_promoted(desk, store):
    desk("waive", "glass-int4@r1", "--gate", KL, "--reason", "for a test", "--until", "2099-01-31")
    desk("promote", "glass-int4", "v1", "--to", "production")
    assert "production of glass-int4 and its line in the history" in desk("verify", "glass-int4@production").out
    assert document(desk("verify", "glass-int4@production", "--json"))["channel"] == "production"

    path = store / "glass-int4" / "channels" / "production.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": "r0001", "path": "glass-int4/rejected/r0001"}, indent=2) + "\n")
    ended = desk("verify", "glass-int4@production")

    assert ended.code == 1 and "production.json: is not what line" in ended.err
    for asked in (
        ["show", "glass-int4@production"],
        ["diff", "glass-int4@production", "glass-int4@v1"],
        ["report", "glass-int4@production"],
    ):
        told = desk(*asked)
        assert told.code == 1 and "production.json: is not what line" in told.err and "NAME" not in told.err
    assert desk("show", "glass-int4@v1").code == 0
    path.write_text("{")
    assert desk("verify", "glass-int4@production").code == 1
    listed = desk("list", "--json")
    assert listed.code == 1 and len(json.loads(listed.out)) == 2


def test_waivers_say_which_count(desk, store):
    desk("waive", "glass-int4@r1", "--gate", KL, "--reason", "for a test", "--until", "2099-01-31")
    assert document(desk("waivers", "glass-int4", "--json"))[0]["counts"] is True
    (store / "allowed_signers").write_text("")

    (told,) = document(desk("waivers", "glass-int4", "--json"))

    assert told["counts"] is False and "not signed by anyone" in told["why_not"]
    assert "is not signed by anyone" in desk("waivers", "glass-int4").out


def test_a_password_is_in_no_message(desk, tmp_path):
    ended = desk("push", "glass-int4@v1", "gs://AKIA:SECRETPW@bucket/x?sig=TOKEN#TOKEN", "--json")

    assert ended.code == 7 and "gs://bucket/x" in ended.err
    assert "SECRETPW" not in ended.out + ended.err and "TOKEN" not in ended.out + ended.err
