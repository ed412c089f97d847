"""What a report says about where it was made."""

from __future__ import annotations

import json

from compress.steps.environment import provenance


def test_a_user_whose_name_is_no_utf8_does_not_keep_a_report_from_being_written(monkeypatch):
    monkeypatch.setenv("USER", "j\udcf6rg")

    assert json.loads(json.dumps(provenance(), ensure_ascii=False).encode("utf-8"))["user"] == "j\\udcf6rg"
