"""Pruning, recovery and quantisation in one recipe: predicted, judged, compared, and rejected where too much went."""

from __future__ import annotations

import json

import pytest

from compress.training import footprint

PRUNE = {"kind": "structured_prune", "mlp_channels": 288}
RECOVER = {"kind": "recover", "train": "weights", "epochs": 2, "learning_rate": 0.002}
INT4 = {"kind": "gptq", "bits": 4, "group_size": 32}


def report_in(store, name="glass-int4"):
    newest = sorted((store / name).glob("**/reports/report.json"))[-1]
    return json.loads(newest.read_text()), newest.parent


@pytest.fixture(scope="module")
def chained(glass_recipe, tmp_path_factory):
    """prune -> recover -> mixed precision -> gptq, run once."""
    from tests.helpers import changed, run_cli, write_recipe

    folder = tmp_path_factory.mktemp("chain")
    mixed = {
        "kind": "mixed_precision",
        "candidates": [3, 4, 6],
        "group_size": 32,
        "tuning_windows": 4,
        "probes": 2,
        "proposals": 2,
        "budget": {"effective_bits": 4.6},
    }
    stages = [PRUNE, RECOVER, mixed, {"kind": "gptq", "bits": "planned"}]
    path = write_recipe(folder / "recipe.yaml", changed(glass_recipe, stages=stages))
    plan = run_cli("plan", path, "--json")
    run = run_cli("run", path, "--store", folder / "store")
    return plan, run, folder / "store"


def test_a_chain_ends_in_a_passing_artifact_of_the_planned_size(chained):
    plan, run, store = chained

    assert run.code == 0, run.err
    predicted = json.loads(plan.out)
    report, folder = report_in(store)
    assert predicted["pruned"] == {"mlp_channels": [341, 288]}
    assert report["memory"]["stored"]["predicted"] == pytest.approx(report["memory"]["stored"]["measured"], rel=0.02)
    assert report["memory"]["kv_cache"]["predicted"] == report["memory"]["kv_cache"]["measured"]
    assert report["round_trip"]["passed"]
    kinds = [stage["kind"] for stage in report["stages"]]
    assert kinds == ["structured_prune", "recover", "sensitivity", "mixed_precision", "gptq"]
    config = json.loads((folder.parent / "model" / "config.json").read_text())
    assert config["intermediate_size"] == 288 and config["quantization_config"]["quant_method"] == "compressed-tensors"
    recovered = report["stages"][1]["facts"]
    assert recovered["held_out_kl_after"] < recovered["held_out_kl_before"]


def test_the_report_answers_whether_quantising_alone_would_have_been_better(chained):
    _, _, store = chained
    report, folder = report_in(store)

    alone = report["quantised_alone"]
    assert 0 < alone["weight_bytes"] <= alone["limit_bytes"] == report["measurements"]["compressed"]["weight_bytes"]
    for face in ("report.md", "report.html"):
        text = (folder / face).read_text()
        assert "Pruned, or only quantised" in text and "Pruning" in text
        assert "parameters went" in text and alone["scheme"].partition(" (")[0] in text
    theirs = alone["values"]["divergence.held-out.mean_kl"]
    low, high = report["measurements"]["intervals"]["divergence.held-out.mean_kl"]
    answers = {theirs < low: "Quantising alone would have been better", theirs > high: "Pruning was worth it"}
    assert answers.get(True, "too close to tell") in text
    assert "was trained towards the source and the other was not" in text
    assert "pruned, or only quantised: At no more bytes than" in chained[1].out


def test_the_model_card_says_how_it_was_made(chained):
    _, _, store = chained
    _, folder = report_in(store)
    card = (folder.parent / "model" / "README.md").read_text()

    assert "- pruned" in card and "parameters went" in card
    assert "weights trained; mean KL on calibration windows kept out of training" in card and "no linears" not in card


def test_what_is_compared_has_its_embedding_rounded_like_the_artifacts(glass_recipe, tmp_path):
    from tests.helpers import changed, run_cli, write_recipe

    stages = [PRUNE, {"kind": "vocabulary", "group_size": 32}, {"kind": "gptq", "bits": 4, "group_size": 32}]
    made = changed(glass_recipe, stages=stages, export={"format": "gguf", "context": 128})
    run = run_cli("run", write_recipe(tmp_path / "recipe.yaml", made), "--store", tmp_path / "store")
    report, _ = report_in(tmp_path / "store")

    assert run.code in (0, 3), run.err
    assert report["memory"]["stored"]["predicted"] == report["memory"]["stored"]["measured"]
    alone = report["quantised_alone"]
    # 16 bits of embedding would take 128 KiB more than the whole artifact leaves at three bits.
    assert alone["scheme"] is not None and alone["weight_bytes"] <= alone["limit_bytes"]


def test_the_gate_rejects_what_was_pruned_too_far(recipe, here, tmp_path, glass_recipe):
    stages = [{"kind": "structured_prune", "mlp_channels": 32, "importance": "magnitude", "compensate": False}]
    gates = [{"kind": "relative", "measure": "perplexity.held-out", "max_ratio": 1.05}]
    path = recipe(stages=stages, gates=gates, export={"format": "plain", "context": 128})

    ended = here("run", path, "--store", tmp_path / "store", "--set", "stages.0.compare=false")

    assert ended.code == 3, ended.err
    report, folder = report_in(tmp_path / "store")
    assert report["quantised_alone"] is None and "rejected" in str(folder)


def test_bytes_are_predicted_exactly(recipe, here, tmp_path):
    ended = here("run", recipe(stages=[PRUNE, INT4]), "--store", tmp_path / "store")

    assert ended.code == 0, ended.err
    memory = report_in(tmp_path / "store")[0]["memory"]
    for quantity in ("stored", "resident", "kv_cache"):
        within = 1e-3 if quantity == "resident" else 0  # the loader keeps rotary frequencies beside the weights
        assert memory[quantity]["predicted"] == pytest.approx(memory[quantity]["measured"], rel=within), quantity


def test_plan_counts_what_a_target_leaves_and_later_stages_see_it(recipe, here):
    """288 channels divide into groups of 32, the source's 341 do not: gptq needs no override behind pruning."""
    ended = here("plan", recipe(stages=[PRUNE, INT4]), "--json")

    assert ended.code == 0, ended.err
    facts = json.loads(ended.out)
    assert facts["pruned"] == {"mlp_channels": [341, 288]}
    assert facts["parameters"] - facts["parameters_after"] == 4 * 3 * 128 * (341 - 288)
    shown = here("plan", recipe(stages=[PRUNE, INT4]))
    assert "mlp channels 341 -> 288" in shown.out and "parameters stay" in shown.out


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ([{"kind": "structured_prune", "target": {"ratio": 0.99}}], "stages[0]: target: "),
        ([{"kind": "structured_prune", "kv_heads": 7}], "stages[0]: kv_heads: 7 should stay, and the model has 2"),
        ([{**INT4, "group_size": "channel"}, PRUNE], "stages[1]: structured_prune works on plain weights"),
        ([{**INT4, "group_size": "channel"}, RECOVER], "stages[1]: recover works on plain weights"),
        (
            [{"kind": "structured_prune", "blocks": 3}, {**RECOVER, "mode": "block"}],
            "stages[1]: mode: block trains each block against the source's, which has 4",
        ),
        ([{"kind": "structured_prune"}], "say how much goes"),
        ([{"kind": "structured_prune", "target": {"ratio": 0.1, "bytes": 5}}], "bytes"),
        ([{"kind": "structured_prune", "target": {"ratio": 0.1}, "parts": ["width"]}], "width"),
        ([{**RECOVER, "train": "scales", "rank": 4}], "rank is LoRA's"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(recipe, here, stages, sentence):
    ended = here("plan", recipe(stages=stages))

    assert ended.code == 2
    assert sentence in ended.err, ended.err


MIXED = {"kind": "mixed_precision", "group_size": 32, "tuning_windows": 4, "budget": {"effective_bits": 4.6}}


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        (
            [
                {**MIXED, "overrides": [{"match": "*.down_proj", "group_size": "channel"}]},
                PRUNE,
                {"kind": "gptq", "bits": "planned"},
            ],
            "structured_prune changes weights that a mixed_precision stage before it has measured; put it first",
        ),
        ([{"kind": "structured_prune", "blocks": 3, "tuning_windows": 24}], "keeps 24 calibration windows apart"),
        ([{"kind": "structured_prune", "target": {"ration": 0.3}}], 'Did you mean "ratio"?'),
        ([{"kind": "structured_prune", "target": {"parameters": 1}}], "embeddings, head) alone takes"),
        ([{"kind": "structured_prune", "target": {"ratio": 0.2}, "multiple": 400}], "by multiples of 400"),
        ([{**PRUNE, "multiple": 100}], "288 is no multiple of 100"),
        ([{"kind": "sparsify", "ignore": ["*"]}], "every linear is ignored"),
    ],
)
def test_what_a_first_user_got_wrong(recipe, here, stages, sentence):
    ended = here("plan", recipe(stages=stages))

    assert ended.code == 2
    assert sentence in ended.err, ended.err


def test_training_the_source_towards_itself_is_warned_of(recipe, here):
    ended = here("plan", recipe(stages=[RECOVER, {**INT4, "group_size": "channel"}]))

    assert ended.code == 0, ended.err
    assert "trains a model against the source that it still is" in ended.out


@pytest.mark.parametrize(("epochs", "warned"), [(1, True), (400, False)])
def test_codes_that_have_no_time_to_move_are_warned_of(recipe, here, epochs, warned):
    codes = {"kind": "recover", "train": "codes", "epochs": epochs}
    ended = here("plan", recipe(stages=[{**INT4, "group_size": "channel"}, codes]))

    assert ended.code == 0, ended.err
    assert ("recover moves a code by" in " ".join(ended.out.split())) is warned


def test_what_will_be_trained_otherwise_is_said_before(recipe, here, monkeypatch):
    """Codes that do not fit, from what is free; a batch larger than the text takes no more than the text."""
    codes = {"kind": "recover", "train": "codes", "batch_tokens": 10**9}
    stages = [{**INT4, "group_size": "channel"}, codes]
    assert "it will train" not in here("plan", recipe(stages=stages)).out

    monkeypatch.setattr(footprint, "free_bytes", lambda device: 10**6)
    ended = here("plan", recipe(stages=stages))

    assert "it will train scales+norms, one block after another" in " ".join(ended.out.split()), ended.err
