"""What judging takes: nothing of what making took."""

from __future__ import annotations

from compress.events import Quiet
from compress.recipe import load_recipe
from compress.steps.plan import make_plan, plan_evaluation
from tests.helpers import changed, write_recipe


def test_judging_a_model_is_planned_without_the_text_it_was_made_with(glass_recipe, tmp_path):
    found = {}
    for own in (0, 4096):
        calibration = {**glass_recipe["calibration"], "self_generated_windows": own}
        path = write_recipe(tmp_path / f"{own}.yaml", changed(glass_recipe, calibration=calibration))
        recipe = load_recipe(path)
        found[own] = plan_evaluation(recipe, recipe.model, Quiet()).peak_host_bytes
        found[f"run {own}"] = make_plan(recipe, None, Quiet()).peak_host_bytes
    assert found[0] == found[4096]
    assert found["run 0"] < found["run 4096"]
