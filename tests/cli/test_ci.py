"""What commands leave for CI, and the workflows that docs/ci.md and the action offer."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.helpers import PROJECT

ACTION = PROJECT / ".github" / "actions" / "compress" / "action.yml"
PAGE = PROJECT / "docs" / "ci.md"


def test_a_run_leaves_junit_annotations_and_a_summary(recipe, here, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("before\n", encoding="utf-8")
    gates = [{"kind": "threshold", "measure": "weight_bytes", "max": 1}]
    junit = tmp_path / "made" / "here" / "junit.xml"
    arguments = ("--store", tmp_path / "store", "--json", "--github", "--junit", junit)
    ended = here("run", recipe(gates=gates), *arguments)
    assert ended.code == 3
    report = json.loads(ended.out)  # stdout holds the report and nothing else
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None and suite.get("failures") == "1"
    assert junit.read_bytes() == (Path(report["artifact"]["path"]) / "reports" / "junit.xml").read_bytes()
    assert "::error title=failed%3A weight_bytes::" in ended.err
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("before\n### Failed") and "report.html" in summary


def test_without_a_summary_file_the_command_says_so(recipe, here, tmp_path, monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    ended = here("run", recipe(), "--store", tmp_path / "store", "--github")
    assert ended.code == 0 and "GITHUB_STEP_SUMMARY is not set" in ended.err and "::notice title=compress" in ended.err


def test_every_mistake_is_an_annotation(recipe, here, tmp_path):
    ended = here("run", recipe(gates=[{"kind": "threshold", "measure": "nothing", "max": 1}], seed=-1), "--github")
    assert ended.code == 2 and "::error title=compress%3A bad recipe::" in ended.err


def test_a_junit_path_that_cannot_be_written_ends_before_any_work(recipe, here, tmp_path):
    ended = here("run", recipe(), "--store", tmp_path / "store", "--junit", tmp_path)
    assert ended.code == 2 and "this is a folder" in ended.err
    (tmp_path / "file").write_text("", encoding="utf-8")
    ended = here("run", recipe(), "--store", tmp_path / "store", "--junit", tmp_path / "file" / "junit.xml")
    assert ended.code == 6 and "cannot be made" in ended.err
    assert not (tmp_path / "store").exists()


def test_a_dry_run_takes_the_same_options(recipe, here, tmp_path):
    ended = here("run", recipe(), "--store", tmp_path / "s", "--dry-run", "--github", "--junit", tmp_path / "j.xml")
    assert ended.code == 0, ended.err


# --- the page and the action ----------------------------------------------------------------------------------------


def options() -> dict[str, set[str]]:
    """Options of every verb."""
    import typer

    from compress.cli import app

    command: Any = typer.main.get_command(app)
    return {
        name: {option for parameter in verb.params for option in parameter.opts if option.startswith("--")}
        for name, verb in command.commands.items()
    }


def shell_lines(text: str) -> list[list[str]]:
    """Every `compress VERB ...` of a text, split."""
    found = re.findall(r"^\W*(?:run: )?(compress [a-z]+ .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


def test_every_command_on_the_page_exists():
    known = options()
    lines = shell_lines(PAGE.read_text(encoding="utf-8"))
    assert {line[1] for line in lines} >= {"validate", "plan", "run"}
    for line in lines:
        used = {word for word in line[2:] if word.startswith("--")}
        assert used <= known[line[1]], line


def test_the_workflows_on_the_page_are_yaml_and_use_what_the_action_has():
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    workflow, steps, gitlab = (yaml.safe_load(block) for block in blocks)
    assert workflow["jobs"]["recipe"]["steps"] and gitlab["compress"]["artifacts"]["reports"]["junit"] == "junit.xml"
    action = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
    assert set(steps[0]["with"]) <= set(action["inputs"])
    used = set(re.findall(r"steps\.judged\.outputs\.([a-z-]+)", blocks[1]))
    assert used and used <= set(action["outputs"])


def test_no_input_is_pasted_into_a_script():
    for step in yaml.safe_load(ACTION.read_text(encoding="utf-8"))["runs"]["steps"]:
        assert "${{" not in step.get("run", ""), step["name"]
        if "run" in step:
            subprocess.run(["bash", "-n"], input=step["run"], text=True, check=True)


@pytest.fixture
def act(tmp_path: Path):
    """act(code, stdout, **inputs) runs the action's script with a compress that answers so."""

    def run(code: int, stdout: str, **inputs: str) -> tuple[int, dict[str, str], list[str]]:
        binary = tmp_path / "bin"
        binary.mkdir(exist_ok=True)
        fake = binary / "compress"
        fake.write_text(
            f"#!/usr/bin/env bash\nprintf '%s\\n' \"$@\" > {tmp_path}/arguments\ncat {tmp_path}/stdout\nexit {code}\n"
        )
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
        (tmp_path / "stdout").write_text(stdout)
        (tmp_path / "output").write_text("")
        action = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
        step = next(step for step in action["runs"]["steps"] if step.get("id") == "compress")
        defaults = {name: str(value.get("default", "")) for name, value in action["inputs"].items()}
        given = defaults | {name.replace("_", "-"): value for name, value in inputs.items()}
        env = {name: given[value[len("${{ inputs.") : -len(" }}")]] for name, value in step["env"].items()}
        env |= {"PATH": f"{binary}:{os.environ['PATH']}", "RUNNER_TEMP": str(tmp_path / "temp")}
        env |= {"GITHUB_OUTPUT": str(tmp_path / "output")}
        done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", step["run"]], env=env, cwd=tmp_path, check=False)
        pairs = (line.split("=", 1) for line in (tmp_path / "output").read_text().splitlines())
        return done.returncode, dict(pairs), (tmp_path / "arguments").read_text().splitlines()

    return run


def test_the_action_runs_a_recipe_and_hands_on_code_and_outputs(act, tmp_path):
    made = tmp_path / "store" / "r0001"
    (made / "reports").mkdir(parents=True)
    (made / "reports" / "report.html").write_text("x")
    report = json.dumps({"verdict": "failed", "artifact": {"path": str(made)}})
    code, outputs, arguments = act(3, report, recipe="my recipe.yaml", arguments="--set stages.0.bits=3")
    assert (code, outputs) == (3, {"verdict": "failed", "exit-code": "3", "path": str(made)})
    assert arguments[:2] == ["run", "my recipe.yaml"] and arguments[-2:] == ["--set", "stages.0.bits=3"]
    assert (tmp_path / "temp" / "compress-report" / "run" / "report.html").is_file()


def test_the_action_judges_a_model_and_can_let_undecided_pass(act):
    report = json.dumps({"verdict": "inconclusive", "artifact": {"path": "p"}})
    given = {"recipe": "r.yaml", "model": "a b", "against": "c"}
    code, outputs, arguments = act(4, report, **given)
    assert code == 4 and outputs["verdict"] == "inconclusive"
    assert arguments[:4] == ["eval", "a b", "--recipe", "r.yaml"] and "--against" in arguments
    assert act(4, report, **given, inconclusive_passes="true")[0] == 0
    assert act(3, report, **given, inconclusive_passes="true")[0] == 3


def test_the_action_survives_an_error_without_a_report(act):
    code, outputs, _ = act(2, json.dumps({"error": {"exit_code": 2}}), recipe="r.yaml")
    assert code == 2 and outputs == {"verdict": "error", "exit-code": "2", "path": ""}
    for odd in ("Traceback", "[]", '{"artifact": null}'):
        code, outputs, _ = act(1, odd, recipe="r.yaml")
        assert (code, outputs["verdict"], outputs["path"]) == (1, "error", "")


def test_arguments_on_several_lines_all_arrive(act):
    report = json.dumps({"verdict": "passed", "artifact": {"path": "p"}})
    _, _, arguments = act(0, report, recipe="r.yaml", arguments="\n--set a=1\n--set b=2\n")
    assert arguments[-4:] == ["--set", "a=1", "--set", "b=2"]


def test_neither_a_path_nor_the_workspace_can_change_the_outputs(act, tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    forged = json.dumps({"verdict": "failed", "artifact": {"path": "p\nverdict=passed"}})
    code, outputs, _ = act(3, forged, recipe="r.yaml")
    assert (code, outputs) == (3, {"verdict": "failed", "exit-code": "3", "path": ""})


def test_the_actions_options_exist():
    known = options()
    script = ACTION.read_text(encoding="utf-8")
    used = set(re.findall(r"(?<!\w)--[a-z]+", script.split('compress "${command[@]}"')[1].splitlines()[0]))
    assert used <= known["run"] & known["eval"] and {"--recipe", "--out", "--against"} <= known["eval"]
