"""Recipes: every mistake at once with its line, overrides, and a resolved recipe that means the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from compress.errors import RecipeError
from compress.recipe import json_schema, load_recipe
from tests.helpers import PROJECT, changed, write_recipe

SHIPPED = sorted((PROJECT / "recipes").rglob("*.yaml"))

GOOD = """\
schema: 1
name: good
model: {hub: someone/some-model}
calibration: {data: python-help, windows: 8}
stages:
  - {kind: gptq, bits: 4, group_size: 64}
evaluation:
  - {kind: perplexity, data: python-docstrings}
  - {kind: divergence, data: python-docstrings}
gates:
  - {kind: relative, measure: perplexity.python-docstrings, max_ratio: 1.1}
"""

BAD = """\
schema: 2
name: Bad Name
seeed: 1
model:
  hub: a/b
  path: ./c
calibration: {data: python-help, windows: 0}
stages:
  - {kind: gptq, bits: 7, group_sise: 64}
  - {kind: gtpq}
  - {bits: 4}
export: {format: compresed-tensors}
evaluation:
  - {kind: divergence, data: self-generated}
gates:
  - {kind: threshold, measure: weight_bytes}
  - {kind: events, event: rounding_falback}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def mistakes(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [mistake.replace(f"{path}:", "r.yaml:") for mistake in caught.value.mistakes]


def test_every_mistake_is_reported_at_once_with_its_line(tmp_path):
    found = mistakes(write(tmp_path, BAD))

    known = "schema, name, seed, model, calibration, stages, export, evaluation, gates"
    assert found == [
        "r.yaml:1: schema: found 2, expected 1",
        "r.yaml:2: name: found 'Bad Name'; use lower-case letters, digits, '.', '_' and '-', at most 64, "
        "no folder separators",
        f'r.yaml:3: seeed: unknown key. Did you mean "seed"? Known here: {known}',
        "r.yaml:4: model: give exactly one of hub, path, package; found hub and path",
        "r.yaml:7: calibration.windows: input should be greater than 0, found 0",
        "r.yaml:9: stages[0].bits: found 7, expected 2, 3, 4, 5, 6, 8 or 'planned'",
        *[mistake for mistake in found if "group_sise" in mistake],
        "r.yaml:10: stages[1]: unknown kind 'gtpq'. Did you mean \"gptq\"? Known: structured_prune, sparsify, "
        "smoothquant, awq, round_to_nearest, gptq, bitsandbytes, recover, sensitivity, mixed_precision, "
        "vocabulary, kv_cache",
        "r.yaml:11: stages[2]: give its `kind`; `compress kinds` lists them",
        "r.yaml:12: export.format: found 'compresed-tensors', expected 'compressed-tensors', 'gptq', "
        "'bitsandbytes', 'gguf' or 'plain'. "
        'Did you mean "compressed-tensors"?',
        "r.yaml:14: evaluation[0].data: text sampled from the model cannot judge the model; name a held-out text",
        "r.yaml:16: gates[0]: give max, min or both: a gate without a bound judges nothing",
        *[mistake for mistake in found if "rounding_falback" in mistake],
    ]
    (typo,) = [mistake for mistake in found if "group_sise" in mistake]
    assert typo.startswith('r.yaml:9: stages[0].group_sise: unknown key. Did you mean "group_size"? Known here: bits')
    (event,) = [mistake for mistake in found if "rounding_falback" in mistake]
    assert event.startswith("r.yaml:17: gates[1].event: no event is called 'rounding_falback'. Did you mean \"round")


def test_mistakes_that_no_single_field_can_see_are_listed_together_too(tmp_path):
    text = GOOD.replace("calibration: {data: python-help, windows: 8}\n", "")
    text = text.replace("perplexity.python-docstrings", "perplexity.python-docstring")
    text = text.replace("divergence, data: python-docstrings", "divergence, data: python-docstrings, windows: 5")

    found = mistakes(write(tmp_path, text))

    assert [mistake.split(": ")[0] for mistake in found] == ["r.yaml:5", "r.yaml:8", "r.yaml:10"]
    assert "gptq needs a calibration text; add `calibration:`" in found[0]
    assert "set 'python-docstrings' is defined twice with different windows" in found[1]
    assert "nothing measures 'perplexity.python-docstring'. Did you mean \"perplexity.python-docstrings\"?" in found[2]


def test_an_unknown_text_is_answered_with_the_nearest(tmp_path):
    (found,) = mistakes(write(tmp_path, GOOD.replace("python-help", "pyton-help")))

    assert found.startswith("r.yaml:4: calibration.data: no text is called 'pyton-help'. Did you mean \"python-help\"?")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe is a mapping of keys"),
        ("- a\n- b\n", "a recipe is a mapping of keys"),
        ("a: [1,\n", "not valid YAML"),
        ("a: 1\nb: {c: 2\n  d: 3}\n", "r.yaml:3: not valid YAML"),
        ("name: a\nname: b\n", "r.yaml:2: name is given twice (first on line 1)"),
        (GOOD.replace("bits: 4,", "bits: 4, bits: 3,"), "r.yaml:6: stages[0].bits is given twice (first on line 6)"),
    ],
)
def test_text_that_is_no_recipe_is_refused_with_its_line(tmp_path, text, message):
    (found,) = mistakes(write(tmp_path, text))

    assert message in found


@pytest.mark.parametrize("key", ["schema", "name", "model", "stages", "evaluation", "gates"])
def test_what_every_recipe_needs_is_missed_by_name(tmp_path, key):
    data = yaml.safe_load(GOOD)
    del data[key]

    found = mistakes(write(tmp_path, yaml.safe_dump(data)))

    assert any(f"{key}: missing; every recipe needs it" in mistake for mistake in found)


@pytest.mark.parametrize("key", ["stages", "evaluation", "gates"])
def test_an_empty_list_judges_or_does_nothing_and_is_refused(tmp_path, key):
    data = yaml.safe_load(GOOD)
    data[key] = []

    assert any(f"{key}: " in mistake for mistake in mistakes(write(tmp_path, yaml.safe_dump(data))))


def test_set_overrides_one_value_read_as_yaml(tmp_path):
    path = write(tmp_path, GOOD)

    loaded = load_recipe(path, ("stages.0.bits=3", "export.context=128", "stages.0.ignore=[a.b, '*.o_proj']", "seed=7"))

    # Patterns are checked against the model later, by plan.
    assert loaded.stages[0].bits == 3 and loaded.export.context == 128 and loaded.seed == 7
    assert loaded.stages[0].ignore == ("a.b", "*.o_proj")
    assert load_recipe(path).stages[0].bits == 4, "the file is left alone"


def test_a_mistake_in_an_override_is_blamed_on_the_override(tmp_path):
    (found,) = mistakes(write(tmp_path, GOOD), "stages.0.bits=7")

    assert found == "--set stages.0.bits=7: stages[0].bits: found 7, expected 2, 3, 4, 5, 6, 8 or 'planned'"


def test_a_key_that_an_override_made_up_on_its_way_is_blamed_on_it_too(tmp_path):
    (found,) = mistakes(write(tmp_path, GOOD), "stage.0.bits=7")

    assert found.startswith('--set stage.0.bits=7: stage: unknown key. Did you mean "stages"?')


def test_what_is_missing_beside_a_key_that_an_override_made_up_is_blamed_on_it(tmp_path):
    text = GOOD.replace("calibration: {data: python-help, windows: 8}\n", "")

    found = mistakes(write(tmp_path, text), "calibration.windows=8")

    assert "--set calibration.windows=8: calibration.data: missing; it is required here" in found


def test_a_stage_of_a_resolved_recipe_can_be_set_to_k_quants(tmp_path):
    path = tmp_path / "resolved.yaml"
    path.write_text(load_recipe(write(tmp_path, GOOD)).dump())

    assert load_recipe(path, ("stages.0.k_quant=true",)).stages[0].k_quant
    (found,) = mistakes(path, "stages.0.k_quant=true", "stages.0.group_size=64")
    assert ": stages[0] (with --set stages.0.k_quant=true, --set stages.0.group_size=64): k_quant: true says" in found


def test_a_field_of_another_kind_is_told_as_one(tmp_path):
    data = yaml.safe_load(GOOD)
    data["stages"] = [
        {"kind": "mixed_precision", "budget": {"effective_bits": 4}, "gradient_windows": 3},
        {"kind": "gptq", "bits": "planned"},
    ]

    (found,) = mistakes(write(tmp_path, yaml.safe_dump(data)))

    assert "stages[0].gradient_windows: unknown key. It is a field of sensitivity. Known here: runtime," in found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.bits", "write it as path=value"),
        ("=3", "write it as path=value"),
        ("stages.4.bits=3", "stages has entries 0 to 0"),
        ("stages.first.bits=3", "stages has entries 0 to 0"),
        ("name.inner=3", "name is a single value"),
        ("seed=[1", "the value is not YAML"),
        ("stages.0.bitz=3", 'Did you mean "bits"?'),
    ],
)
def test_an_override_that_leads_nowhere_is_explained(tmp_path, override, message):
    (found,) = mistakes(write(tmp_path, GOOD), override)

    assert message in found and found.startswith(f"--set {override}")


def test_a_resolved_recipe_is_the_same_recipe(tmp_path):
    path = write(tmp_path, GOOD)
    recipe = load_recipe(path, ("stages.0.bits=3",))
    (tmp_path / "elsewhere").mkdir()
    stored = tmp_path / "elsewhere" / "recipe.yaml"
    stored.write_text(recipe.dump())

    again = load_recipe(stored)

    assert again == recipe
    assert again.digest() == recipe.digest() != load_recipe(path).digest()
    assert again.dump() == recipe.dump()


def test_relative_paths_are_resolved_from_the_recipes_folder(tmp_path, monkeypatch, glass_recipe):
    (tmp_path / "model").mkdir()
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    data = {"kind": "files", "paths": ["t.jsonl"]}
    relative = {
        **glass_recipe,
        "model": {"path": "model"},
        "calibration": {"data": data},
        "evaluation": [{**entry, "data": data} for entry in glass_recipe["evaluation"]],
    }
    path = write(tmp_path, yaml.safe_dump(relative))
    monkeypatch.chdir("/")

    recipe = load_recipe(path)

    assert recipe.model.path == tmp_path / "model"
    assert recipe.calibration.data.paths == (str(tmp_path / "t.jsonl"),)


def test_a_text_described_beside_the_recipe_travels_with_the_resolved_recipe(tmp_path):
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "ours.yaml").write_text("source: {kind: files, paths: [t.jsonl]}\n")
    (tmp_path / "calibration" / "t.jsonl").write_text('{"text": "a"}\n')
    recipe = load_recipe(write(tmp_path, GOOD.replace("python-docstrings", "ours")))
    (tmp_path / "elsewhere").mkdir()
    stored = tmp_path / "elsewhere" / "recipe.yaml"
    stored.write_text(recipe.dump())

    again = load_recipe(stored)

    assert again == recipe
    assert again.evaluation[0].set_name == "ours"
    assert again.evaluation[0].data.paths == (str(tmp_path / "calibration" / "t.jsonl"),)


def test_a_recipe_is_frozen(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))

    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


def test_there_are_shipped_recipes():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid_or_misses_only_text_that_must_be_fetched(path):
    try:
        assert load_recipe(path).name
    except RecipeError as error:
        assert all("does not exist. Run" in mistake or "get_texts.py" in mistake for mistake in error.mistakes), error


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_json_schema_accepts_every_shipped_recipe(path):
    jsonschema = pytest.importorskip("jsonschema")

    jsonschema.Draft202012Validator(json_schema()).validate(yaml.safe_load(path.read_text()))


def test_the_json_schema_refuses_what_the_loader_refuses():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())

    validator.validate(yaml.safe_load(GOOD))
    assert len(list(validator.iter_errors(yaml.safe_load(BAD)))) >= 5


def test_the_json_schema_names_every_key_an_editor_should_offer():
    schema = json_schema()

    assert set(schema["properties"]) == set(yaml.safe_load(GOOD)) | {"seed", "export"}
    assert schema["additionalProperties"] is False
    assert {"Gptq", "RoundToNearest", "ThresholdGate", "RelativeGate", "EventsGate"} <= set(schema["$defs"])


def task_recipe(tmp_path, glass_recipe, *tasks):
    (tmp_path / "t.jsonl").write_text('{"id": 1, "context": "a", "choices": ["b", "c"], "answer": "b"}\n')
    recipe = {**glass_recipe, "evaluation": [*glass_recipe["evaluation"], *tasks]}
    return write_recipe(tmp_path / "r.yaml", recipe)


def test_files_of_tasks_become_absolute(tmp_path, glass_recipe):
    recipe = load_recipe(task_recipe(tmp_path, glass_recipe, {"kind": "task", "name": "t", "file": "t.jsonl"}))
    assert recipe.tasks[0].file == tmp_path / "t.jsonl"
    assert [spec.kind for spec in recipe.on_text] == ["perplexity", "divergence"]
    stored = tmp_path / "elsewhere"
    stored.mkdir()
    (stored / "recipe.yaml").write_text(recipe.dump())
    assert load_recipe(stored / "recipe.yaml").digest() == recipe.digest()


def test_tasks_need_names_of_their_own_and_a_text_beside_them(tmp_path, glass_recipe):
    task = {"kind": "task", "name": "t", "file": "t.jsonl"}
    with pytest.raises(RecipeError, match=r"evaluation\[3\]: task 't' is named twice"):
        load_recipe(task_recipe(tmp_path, glass_recipe, task, task))
    gates = [{"kind": "threshold", "measure": "task.t.accuracy", "min": 0.5}]
    only = {**glass_recipe, "evaluation": [task], "gates": gates}
    with pytest.raises(RecipeError, match="no text is evaluated; add a perplexity or a divergence"):
        load_recipe(write_recipe(tmp_path / "r.yaml", only))


def test_too_few_candidates_are_told_with_their_line(tmp_path):
    (said,) = mistakes(write(tmp_path, GOOD.replace("kind: gptq, bits: 4", "kind: sensitivity, candidates: [4]")))

    assert said.startswith("r.yaml:6: stages[0].candidates: ") and "at least 2" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"export": "gguf"}, "export: found 'gguf', expected keys and values"),
        ({"stages": ["gptq"]}, "stages[0]: found 'gptq', expected keys and values"),
        ({"calibration": "python-help"}, "calibration: found 'python-help', expected keys and values"),
        ({"export": 3}, "export: found 3, expected keys and values"),
    ],
)
def test_a_word_where_keys_belong_is_told_with_its_place(change, said, glass_recipe, tmp_path):
    with pytest.raises(RecipeError) as error:
        load_recipe(write_recipe(tmp_path / "r.yaml", changed(glass_recipe, **change)))
    assert said in str(error.value)


def test_set_takes_a_place_as_messages_print_it(glass_recipe, tmp_path):
    path = write_recipe(tmp_path / "r.yaml", glass_recipe)
    assert load_recipe(path, ("stages[0].bits=3",)).stages[0].bits == 3


def test_stages_are_named_by_their_numbers_in_the_file(glass_recipe, tmp_path):
    stages = [
        {"kind": "vocabulary", "group_size": 32},
        {"kind": "mixed_precision", "budget": {"ratio": 0.5}},
        {"kind": "gptq", "bits": "planned", "quality": "max"},
        {"kind": "kv_cache"},
    ]
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", changed(glass_recipe, stages=stages)))
    kinds = ["vocabulary", "sensitivity", "mixed_precision", "gptq", "recover", "kv_cache"]
    assert [stage.kind for stage in recipe.stages] == kinds
    assert [recipe.place(index)[7] for index in range(6)] == ["0", "1", "1", "2", "2", "3"]
    (tmp_path / "stored.yaml").write_text(recipe.dump(), encoding="utf-8")
    stored = load_recipe(tmp_path / "stored.yaml")
    assert [stored.place(index)[7] for index in range(6)] == list("012345")


def test_a_named_text_that_is_sampled_takes_none_beside_it(glass_recipe, tmp_path):
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "own.yaml").write_text("source: {kind: self-generated}\n")
    text = {"data": "own", "windows": 4, "self_generated_windows": 2}
    with pytest.raises(RecipeError, match="own is sampled from the model already"):
        load_recipe(write_recipe(tmp_path / "r.yaml", changed(glass_recipe, calibration=text)))
