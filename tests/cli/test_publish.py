"""`compress publish` with a hub that is not there: what is uploaded, what is refused, how it ends without a token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FILES = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


class FakeApi:
    """The part of HfApi that is used; what it was asked is in `calls`."""

    calls: list[tuple[str, dict[str, Any]]]
    is_private = True
    raises: Exception | None = None

    def __init__(self, token: str) -> None:
        assert token == "hf_fake"

    def create_repo(self, repo_id: str, **arguments: Any) -> None:
        if FakeApi.raises:
            raise FakeApi.raises
        FakeApi.calls.append(("create_repo", {"repo_id": repo_id, **arguments}))

    def repo_info(self, repo_id: str, repo_type: str) -> Any:
        return SimpleNamespace(private=FakeApi.is_private)

    def upload_folder(self, **arguments: Any) -> Any:
        FakeApi.calls.append(("upload_folder", arguments))
        return SimpleNamespace(commit_url="https://hub.invalid/me/glass/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_fake")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    FakeApi.calls, FakeApi.is_private, FakeApi.raises = [], True, None
    return FakeApi


@pytest.fixture
def store(published: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(published[0], tmp_path / "store"))


def test_the_model_folder_is_uploaded_with_its_card(here, store, hub):
    ended = here("publish", "glass-int4", "me/glass", "--store", store, "--json")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["url"] == "https://hub.invalid/me/glass/commit/1" and told["artifact"] == "glass-int4@v0001"
    (made, uploaded) = hub.calls
    assert made == ("create_repo", {"repo_id": "me/glass", "private": None, "exist_ok": True, "repo_type": "model"})
    assert uploaded[1]["folder_path"] == store / "glass-int4" / "v0001" / "model"
    assert set(uploaded[1]["allow_patterns"]) == {file["path"] for file in told["files"]} >= FILES
    assert uploaded[1]["commit_message"] == "compress: glass-int4@v0001, passed"


def test_a_dry_run_lists_the_files_and_asks_no_one(here, store, hub):
    ended = here("publish", "glass-int4", "me/glass", "--store", store, "--dry-run")
    assert ended.code == 0 and hub.calls == []
    assert all(name in ended.out for name in FILES) and "would upload" in ended.out


def test_private_is_private_or_nothing_is_uploaded(here, store, hub):
    assert here("publish", "glass-int4", "me/glass", "--store", store, "--private").code == 0
    assert hub.calls[0][1]["private"] is True
    hub.calls, hub.is_private = [], False
    ended = here("publish", "glass-int4", "me/glass", "--store", store, "--private")
    assert ended.code == 2 and "exists and is public" in ended.err
    assert [name for name, _ in hub.calls] == ["create_repo"]


def test_what_failed_is_refused_unless_asked_for(here, rejected, hub):
    refused = here("publish", "glass-int4@r0001", "me/glass", "--store", rejected[0])
    assert refused.code == 3 and "its verdict is failed" in refused.err and "--rejected-too" in refused.err
    assert hub.calls == []
    assert here("publish", "glass-int4@r0001", "me/glass", "--store", rejected[0], "--rejected-too").code == 0
    assert hub.calls[1][1]["commit_message"].endswith("failed")


def test_without_a_token_it_ends_with_7_and_the_remedy(here, store, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    ended = here("publish", "glass-int4", "me/glass", "--store", store)
    assert ended.code == 7 and "hf auth login" in ended.err and hub.calls == []


def test_offline_it_ends_with_7(here, store, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ended = here("publish", "glass-int4", "me/glass", "--store", store)
    assert ended.code == 7 and "HF_HUB_OFFLINE" in ended.err


@pytest.mark.parametrize(
    ("name", "says"), [("glass", "e.g. me/glass"), ("me/gl ass", "no name of a repository"), ("a/b/c", "no name")]
)
def test_names_that_the_hub_does_not_have_are_refused(here, store, hub, name, says):
    ended = here("publish", "glass-int4", name, "--store", store)
    assert ended.code == 2 and says in ended.err and hub.calls == []


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_what_was_changed_since_is_not_uploaded(here, store, hub, options):
    with (store / "glass-int4" / "v0001" / "model" / "config.json").open("a") as stream:
        stream.write(" ")
    ended = here("publish", "glass-int4", "me/glass", "--store", store, *options)
    assert ended.code == 1 and "is not whole and was not published: model/config.json" in ended.err
    assert hub.calls == []


@pytest.mark.parametrize(
    ("status", "says"), [(403, "may not write to me/glass"), (401, "hf auth login"), (503, "try again")]
)
def test_what_the_hub_refuses_ends_with_7(here, store, hub, status, says):
    from huggingface_hub.errors import HfHubHTTPError

    error = HfHubHTTPError("no", response=SimpleNamespace(status_code=status, headers={}, request=None))
    hub.raises = error
    ended = here("publish", "glass-int4", "me/glass", "--store", store)
    assert ended.code == 7 and says in ended.err and "Traceback" not in ended.err


def test_no_network_ends_with_7(here, store, hub):
    hub.raises = ConnectionError("name resolution failed")
    ended = here("publish", "glass-int4", "me/glass", "--store", store)
    assert ended.code == 7 and "cannot be reached" in ended.err


def waive(here, store: Path, gate: str) -> None:
    asked = ("glass-int4", "r0001", "--gate", gate, "--reason", "a demo", "--until", "2099-01-01", "--by", "kim")
    ended = here("waive", *asked, "--store", store)
    assert ended.code == 0, ended.err


def test_a_waiver_that_counts_lets_a_failed_version_out_and_one_that_does_not_count_does_not(
    here, rejected, hub, tmp_path
):
    store = Path(shutil.copytree(rejected[0], tmp_path / "waived"))
    asked = ("publish", "glass-int4@r0001", "me/glass", "--store", store, "--dry-run")
    assert here(*asked).code == 3
    waive(here, store, "divergence.held-out.mean_kl")
    assert here(*asked).code == 0
    # With allowed signers, a waiver that nobody signed does not count.
    (store / "allowed_signers").write_text("anna@example.org ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAA\n")
    ended = here(*asked)
    assert ended.code == 3 and "no waiver that counts covers" in ended.err


def test_a_copy_outside_a_store_has_no_waivers(here, rejected, hub, tmp_path):
    copy = shutil.copytree(rejected[0] / "glass-int4" / "rejected" / "r0001", tmp_path / "r0001")
    ended = here("publish", copy, "me/glass", "--dry-run")
    assert ended.code == 3 and "its verdict is failed" in ended.err
    assert here("report", copy).code == 0
