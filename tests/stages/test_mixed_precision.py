"""Sensitivity and the choice made from it: budgets kept, units together, predictions near what is measured; resumed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from compress.allocation.budget import Budget, Sizes, activation_bytes
from compress.architecture import architecture_of, dimensions_of
from compress.checkpoints.candidates import Assigned, candidates_in
from compress.checkpoints.export import export
from compress.checkpoints.formats import FORMATS
from compress.checkpoints.formats.compressed_tensors import quantization_config
from compress.checkpoints.formats.gguf import effective_bits, type_of
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Skeleton
from compress.errors import RecipeError
from compress.events import Quiet
from compress.memory.predict import kv_cache_bytes
from compress.quantization.scheme import Scheme
from compress.stages import (
    Gptq,
    MixedPrecision,
    RoundToNearest,
    Sensitivity,
    Vocabulary,
    choosing,
    sensitivity_block,
)
from compress.stages.tuning import Judged
from tests.tiny import (
    CPU,
    apply_stage,
    load_publicly,
    our_logits,
    random_model,
    random_windows,
    stage_context,
    their_logits,
)

WINDOWS = random_windows(count=24)
FIELDS = {"candidates": (3, 4, 8), "group_size": 32, "tuning_windows": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    random_model("llama", folder)
    return folder


@pytest.fixture(scope="module")
def solved(model, tmp_path_factory):
    """The output of sensitivity."""
    folder = tmp_path_factory.mktemp("sensitivity") / "out"
    apply_stage(Sensitivity(**FIELDS), model, folder, WINDOWS)
    return folder


def choose(solved, folder, model, **fields):
    return apply_stage(
        MixedPrecision(**{**FIELDS, "probes": 2, "proposals": 2, **fields}), solved, folder, WINDOWS, origin=model
    )


@pytest.mark.parametrize("bits", [3.6, 4.5, 7.0])
def test_a_plan_keeps_its_budget_and_its_units_together(solved, model, tmp_path, bits):
    checkpoint, outcome = choose(solved, tmp_path / "out", model, budget={"effective_bits": bits})
    plan = checkpoint.precision_plan
    assert plan is not None and len(plan) == 14
    shapes = Skeleton(checkpoint.config, CPU, torch.float32).linear_shapes()
    stored = sum(plan[name].stored_bytes(*shape) for name, shape in shapes.items())
    weights = sum(rows * columns for rows, columns in shapes.values())
    assert 8 * stored / weights <= bits
    assert outcome.facts["effective_bits"] == pytest.approx(8 * stored / weights)
    for index in range(2):
        for together in checkpoint.architecture.fused:
            assert len({plan[f"{checkpoint.architecture.block_name(index)}.{name}"] for name in together}) == 1
    assert outcome.facts["kl"] == min(outcome.facts["kl"], *(each["kl"] for each in outcome.facts["uniform"]))


def test_a_runtime_that_fuses_nothing_lets_every_linear_have_its_own(model, tmp_path):
    """transformers loads the mixture, q, k and v of a block in different schemes, and computes what we do."""
    fields = {**FIELDS, "runtime": "transformers"}
    apply_stage(Sensitivity(**fields), model, tmp_path / "solved", WINDOWS)
    more = {"runtime": "transformers", "budget": {"effective_bits": 5.0}}

    planned, outcome = choose(tmp_path / "solved", tmp_path / "plan", model, **more)
    done, _ = apply_stage(Gptq(bits="planned"), tmp_path / "plan", tmp_path / "done", WINDOWS, origin=model)
    export(done, tmp_path / "export", "compressed-tensors", torch.float16, 10**9)

    kinds = {"q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"}
    assert set(outcome.facts["fit"]["factors"]) == kinds, "a dozen choices do not tell seven factors"
    assert len(outcome.facts["units"]) == 14 and outcome.facts["effective_bits"] <= 5.0
    plan, arch = planned.precision_plan, planned.architecture
    differ = [
        together
        for index in range(2)
        for together in arch.fused
        if len({plan[f"{arch.block_name(index)}.{name}"] for name in together}) > 1
    ]
    assert differ
    text = WINDOWS.first(2)
    theirs = their_logits(load_publicly(tmp_path / "export"), text)
    torch.testing.assert_close(theirs, our_logits(tmp_path / "export", text), rtol=1e-4, atol=1e-5)


LLAMA_CPP = {"runtime": "llama.cpp", "tuning_windows": 4}
SIZES = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}


@pytest.mark.parametrize("budget", [{"effective_bits": 5.2}, {"weight_bytes": 64_000}])
def test_for_llama_cpp_a_budget_is_of_gguf_bytes_and_the_file_has_them(tmp_path, budget):
    """Block types, with minimums among them, and an embedding rounded before: all counted as they are written."""
    random_model("llama", tmp_path / "model", torch.float16, **SIZES)
    apply_stage(Vocabulary(group_size=32), tmp_path / "model", tmp_path / "rounded")
    more = {"origin": tmp_path / "model", "windows": WINDOWS}
    apply_stage(Sensitivity(**LLAMA_CPP), tmp_path / "rounded", tmp_path / "solved", **more)
    stage = MixedPrecision(**LLAMA_CPP, budget=budget, probes=2, proposals=2)

    checkpoint, outcome = apply_stage(stage, tmp_path / "solved", tmp_path / "plan", **more)
    done, _ = apply_stage(Gptq(bits="planned"), tmp_path / "plan", tmp_path / "done", **more)
    written = export(done, tmp_path / "export", "gguf", torch.float16, 10**9)

    assert len(set(checkpoint.precision_plan.values())) > 1 and outcome.facts["plan"] == "mixed"
    bits = effective_bits(tmp_path / "export" / "model.gguf")
    assert bits == pytest.approx(outcome.facts["effective_bits"])
    if "weight_bytes" in budget:
        assert 0.97 * budget["weight_bytes"] < written.bytes <= budget["weight_bytes"]
    else:
        assert 0.97 * 5.2 < bits <= 5.2


def test_for_llama_cpp_groups_are_32_columns_unless_others_are_given():
    groups = {scheme.group_size for scheme in Sensitivity(runtime="llama.cpp", candidates=(4, 8)).options("a.b")}
    assert groups == {32}
    wide = Sensitivity(runtime="llama.cpp", group_size=64)
    assert {scheme.group_size for scheme in wide.options("a.b")} == {64}
    (said,) = {
        each.partition("; ")[2]
        for each in wide.check({"model.layers.0.x": (8, 352)}, architecture_of({"model_type": "llama"}))
    }
    assert said == "use group_size 32, 352 or channel for x (overrides), or ignore it"


def test_for_llama_cpp_candidates_are_its_block_types():
    kinds = [type_of(scheme) for scheme in Sensitivity(runtime="llama.cpp").options("model.layers.0.mlp.up_proj")]
    assert kinds == ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
    assert Sensitivity(runtime="llama.cpp", candidates=(4, 8)).candidates == Sensitivity(candidates=(4, 8)).candidates


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"runtime": "llama.cpp", "candidates": (4, 8), "group_size": 16}, "blocks are 32 columns wide"),
        ({"candidates": (4, {"bits": 4, "symmetric": False}), "group_size": 32}, "no mixtures with zero points"),
    ],
)
def test_candidates_that_the_runtime_does_not_run_are_refused(model, fields, said):
    checkpoint = Checkpoint(model)
    shapes = Skeleton(checkpoint.config, CPU, torch.float32).linear_shapes()
    assert any(said in each for each in Sensitivity(**fields).check(shapes, checkpoint.architecture))


def test_what_follows_a_plan_has_its_schemes(solved, model, tmp_path):
    planned, _ = choose(solved, tmp_path / "plan", model, budget={"effective_bits": 4.5})
    for stage in (Gptq(bits="planned"), RoundToNearest(bits="planned")):
        followed, _ = apply_stage(stage, tmp_path / "plan", tmp_path / stage.kind, WINDOWS, origin=model)
        assert followed.schemes == planned.precision_plan


def test_the_measured_divergence_is_that_of_the_candidates_written_out(solved, model, tmp_path):
    """The uniform choice, against rounding the same codes into a checkpoint and reading it as any other."""
    found = candidates_in(solved, 2)
    schemes = {module: [Scheme.from_json(each["scheme"]) for each in rows] for module, rows in found.items()}
    assigned = Assigned(solved, schemes, dict.fromkeys(found, 1))
    with torch.no_grad():
        skeleton = Skeleton(assigned.config, CPU, torch.float32)
        with skeleton.loaded(assigned, "model.layers.1") as block:
            mine = block.mlp.down_proj.weight.clone()
    one, _ = apply_stage(
        Gptq(bits=4, group_size=32, quality="fast", ignore=("model.layers.0.*", "*attn*", "*gate_proj", "*up_proj")),
        model,
        tmp_path / "gptq",
        WINDOWS.part(0, 20),
    )
    # Only the last linear's inputs are untouched by earlier rounding there, so only it can be the same.
    torch.testing.assert_close(mine, one.dense("model.layers.1.mlp.down_proj").float())


def test_costs_predict_small_divergences(solved, model):
    """One linear at 8 bits, all others as they are: the second-order cost is the divergence to a third."""
    found = candidates_in(solved, 2)
    schemes = {module: [Scheme.from_json(each["scheme"]) for each in rows] for module, rows in found.items()}
    text = random_windows(count=64, seed=5)
    before = our_logits(model, text).log_softmax(-1)
    ratios = []
    for module, rows in found.items():
        assigned = Assigned(solved, schemes, {module: 1})
        after = _logits(assigned, text).log_softmax(-1)
        divergence = float((before.exp() * (before - after)).sum(-1).mean())
        ratios.append(divergence / rows[1]["cost"])
    ratios.sort()
    assert 0.5 < ratios[len(ratios) // 2] < 2, ratios


def _logits(checkpoint, windows):
    from compress.evaluation.measure import walk_states

    states = walk_states(checkpoint, {"set": windows}, CPU, torch.float32, 48, Quiet(), "")["set"]
    with Skeleton(checkpoint.config, CPU, torch.float32).head(checkpoint) as head:
        return torch.stack([head.logits(window) for window in states])


def test_more_bits_cost_less_and_take_more_bytes(solved):
    for rows in candidates_in(solved, 2).values():
        assert [row["cost"] for row in rows] == sorted((row["cost"] for row in rows), reverse=True)
        assert [row["bytes"] for row in rows] == sorted(row["bytes"] for row in rows)


def test_the_smallest_budget_that_an_error_names_is_feasible(solved, model, tmp_path):
    with pytest.raises(RecipeError, match="smallest feasible budget is effective_bits") as error:
        choose(solved, tmp_path / "out", model, budget={"effective_bits": 2.5})
    named = float(str(error.value).split("smallest feasible budget is effective_bits ")[1].split(";")[0])
    _, outcome = choose(solved, tmp_path / "again", model, budget={"effective_bits": named})
    assert outcome.facts["effective_bits"] <= named


def test_a_mixture_that_does_not_win_is_not_shipped(solved, model, tmp_path):
    """Everything fits at the largest candidate: the choice is uniform, and no mixture beats it."""
    checkpoint, outcome = choose(solved, tmp_path / "out", model, budget={"effective_bits": 16})
    assert {scheme.bits for scheme in checkpoint.precision_plan.values()} == {8}
    assert outcome.facts["plan"] == "uniform" and [event.kind for event in outcome.events] == ["uniform_kept"]


def test_a_stopped_sensitivity_goes_on_to_the_same_candidates(model, solved, tmp_path):
    done = []

    def context(after_block):
        return stage_context(model, tmp_path / "stopped", WINDOWS, after_block=after_block)

    def stop(index):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sensitivity(**FIELDS).apply(context(stop))
    Sensitivity(**FIELDS).apply(context(done.append))
    assert done == [1], "a finished block is not solved again"
    assert candidates_in(tmp_path / "stopped", 2) == candidates_in(solved, 2)
    for path in (solved / "candidates").iterdir():
        assert path.read_bytes() == (tmp_path / "stopped" / "candidates" / path.name).read_bytes()


def test_products_in_bfloat16_change_costs_a_little(model, solved, tmp_path):
    """Linears and the head multiply in them; candidates stay close to those of float32."""
    apply_stage(Sensitivity(**FIELDS, products="bfloat16"), model, tmp_path / "out", WINDOWS)
    exact, rounded = candidates_in(solved, 2), candidates_in(tmp_path / "out", 2)
    costs = [torch.tensor([each["cost"] for rows in found.values() for each in rows]) for found in (exact, rounded)]
    assert not torch.equal(*costs)
    torch.testing.assert_close(costs[0].sum(), costs[1].sum(), rtol=0.1, atol=0)


@pytest.mark.parametrize("first_is_better", [False, True])
def test_proposals_disturb_the_costs_whose_choice_measured_better(
    solved, model, tmp_path, monkeypatch, first_is_better
):
    asked, disturbed, fit = [], choosing.Run.disturbed, choosing.Choices.fit

    def judged(self, choice):
        first = choice == self.cheapest(self.costs, int(4.5 * self.sizes.weights / 8))
        return Judged(0.1 if first == first_is_better else 0.2, 0.0)

    def misfit(self, choices):
        found = fit(self, choices)
        return dataclasses.replace(found, factors={**found.factors, "down_proj": 1e4})

    def remembering(self, costs, spread, most):
        if spread == choosing.SPREAD_OF_PROPOSALS:
            asked.append(costs == self.choices.costs)
        return disturbed(self, costs, spread, most)

    monkeypatch.setattr(choosing.Choices, "judge", judged)
    monkeypatch.setattr(choosing.Choices, "fit", misfit)
    monkeypatch.setattr(choosing.Run, "disturbed", remembering)
    choose(solved, tmp_path / "out", model, budget={"effective_bits": 4.5})

    assert asked == [first_is_better] * 2


def test_what_was_measured_before_a_kill_is_not_measured_again(solved, model, tmp_path, monkeypatch):
    stage = MixedPrecision(**FIELDS, budget={"effective_bits": 4.5}, probes=3, proposals=0)
    whole, _ = apply_stage(stage, solved, tmp_path / "whole", WINDOWS, origin=model)
    kept = tmp_path / "again" / "scratch"
    kept.mkdir(parents=True)
    import compress.stages.choices as module

    seen = []
    original = module.write_json
    monkeypatch.setattr(
        module, "write_json", lambda path, value: (seen.append(json.dumps(value)), original(path, value))
    )
    apply_stage(stage, solved, tmp_path / "again", WINDOWS, origin=model)
    (tmp_path / "third" / "scratch").mkdir(parents=True)
    (tmp_path / "third" / "scratch" / "measured.json").write_text(seen[-1])
    seen.clear()
    third, _ = apply_stage(stage, solved, tmp_path / "third", WINDOWS, origin=model)
    assert seen == [] and third.precision_plan == whole.precision_plan


def test_serving_bytes_leave_weights_what_the_cache_and_the_runtime_do_not_take(model):
    checkpoint = Checkpoint(model)
    skeleton = Skeleton(checkpoint.config, CPU, torch.float32)
    shapes, dimensions = skeleton.linear_shapes(), dimensions_of(skeleton.config)
    sizes = Sizes.of(
        skeleton.parameter_shapes(), shapes, dimensions, 2, checkpoint.weight_bytes, FORMATS["compressed-tensors"], {}
    )
    budget = Budget(serving_bytes=10**7, context=64, concurrency=3, kv_cache_bits=8, runtime_bytes=10**6)
    cache = kv_cache_bytes(dimensions, 64, 3, 1)
    left = 10**7 - 10**6 - cache - activation_bytes(sizes, 2048, 3) - sizes.other_bytes
    assert budget.linear_bytes(sizes) == left
    assert budget.amount_for(left, sizes) == 10**7
    # q, k, v and o of 4 and 2 heads of 16, twice the inner 96, twice the hidden 64, in 2 bytes; logits in 4
    assert activation_bytes(sizes, 1, 1) == (2 * 64 + 2 * 6 * 16 + 2 * 96) * 2 + 160 * 4


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({}, "none is given"),
        ({"effective_bits": 4, "ratio": 0.5}, "effective_bits and ratio are given"),
        ({"effective_bits": 4, "context": 9}, "context belong to serving_bytes"),
        ({"effective_bits": 0}, "greater than 0"),
    ],
)
def test_budgets_that_say_nothing_or_two_things_are_refused(budget, said):
    with pytest.raises(ValueError, match=said):
        Budget(**budget)


def test_a_mixed_config_is_matched_by_compressed_tensors_and_under_fused_names(solved, model, tmp_path):
    """The library's own matcher gives each module one group, its own; so do the names of a runtime that fuses."""
    from compressed_tensors.utils.match import is_match

    checkpoint, _ = choose(solved, tmp_path / "out", model, budget={"effective_bits": 4.6})
    plan = checkpoint.precision_plan
    config = quantization_config(plan, ["lm_head"])
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    linear = torch.nn.Linear(1, 1)
    asked = dict(plan)
    for index in range(2):
        asked[f"model.layers.{index}.self_attn.qkv_proj"] = plan[f"model.layers.{index}.self_attn.q_proj"]
        asked[f"model.layers.{index}.mlp.gate_up_proj"] = plan[f"model.layers.{index}.mlp.up_proj"]
    assert len(config["config_groups"]) > 1
    for name, scheme in asked.items():
        matched = [
            group["weights"]
            for group in config["config_groups"].values()
            if is_match(name, linear, group["targets"], config["ignore"], fused)
        ]
        assert [(weights["num_bits"], weights["group_size"]) for weights in matched] == [
            (scheme.bits, scheme.group_size)
        ]
    assert not any(
        is_match("lm_head", linear, g["targets"], config["ignore"]) for g in config["config_groups"].values()
    )


# --- embedding and head, 16 bits, integer inputs ---------------------------------------------------------------------

TIED = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}
UNTIED = {**TIED, "tie_word_embeddings": False}


def chosen_with_vocabulary(folder, sizes, budget, **fields):
    """A model of those sizes through sensitivity, the choice, and what follows it. Returns the last and the outcome."""
    random_model("llama", folder / "model", torch.float16, **sizes)
    more = {"origin": folder / "model", "windows": WINDOWS}
    given = {"tuning_windows": 4, "vocabulary": True, **fields}
    solved, _ = apply_stage(Sensitivity(**given), folder / "model", folder / "solved", **more)
    stage = MixedPrecision(**given, budget=budget, probes=2, proposals=2)
    _, outcome = apply_stage(stage, folder / "solved", folder / "plan", **more)
    apply_stage(Vocabulary(bits="planned"), folder / "plan", folder / "rounded", **more)
    done, _ = apply_stage(Gptq(bits="planned"), folder / "rounded", folder / "done", **more)
    return solved, done, outcome


@pytest.mark.parametrize("share", [0.3, 0.35, 0.6])
def test_a_tied_embedding_is_chosen_for_beside_linears_and_the_file_keeps_the_budget(tmp_path, share):
    budget = {"ratio": share}
    _, done, outcome = chosen_with_vocabulary(tmp_path, TIED, budget, runtime="llama.cpp")
    written = export(done, tmp_path / "export", "gguf", torch.float16, 10**9)

    source = Checkpoint(tmp_path / "model").weight_bytes
    assert written.bytes <= share * source
    assert written.bytes == outcome.facts["linear_bytes"] + outcome.facts["other_bytes"]
    (unit,) = [each for each in outcome.facts["units"] if each["block"] is None]
    assert unit["kind"] == "embed_tokens" and outcome.facts["fit"]["factors"]["embed_tokens"] == 1
    plan = Checkpoint(tmp_path / "plan").precision_plan
    assert done.schemes == plan
    assert (unit["bits"] == 16) == ("model.embed_tokens" not in plan)
    if share == 0.3:
        assert unit["bits"] < 16, "in 16 bits it leaves too little for linears"


def test_what_rounding_an_embedding_costs_is_measured_and_is_what_the_stage_for_it_does(tmp_path):
    solved, _, _ = chosen_with_vocabulary(tmp_path, TIED, {"ratio": 0.4}, runtime="llama.cpp")
    rows = candidates_in(solved.folder, 2)["model.embed_tokens"]
    kinds = [each["scheme"] and Scheme.from_json(each["scheme"]) for each in rows]
    assert kinds[-1] is None and rows[-1]["cost"] == 0
    _, tuning = WINDOWS.apart(4)
    before = our_logits(tmp_path / "model", tuning).log_softmax(-1)
    for number, (scheme, row) in enumerate(zip(kinds[:-1], rows, strict=False)):
        zero_points = "free" if scheme.free_minima else "integer"
        stage = Vocabulary(bits=scheme.bits, symmetric=scheme.symmetric, zero_points=zero_points, group_size=32)
        alone, _ = apply_stage(stage, tmp_path / "model", tmp_path / f"alone{number}")
        after = our_logits(alone.folder, tuning).log_softmax(-1)
        # The last token of a window predicts nothing.
        divergence = float((before.exp() * (before - after)).sum(-1)[:, :-1].mean())
        assert row["cost"] == pytest.approx(divergence, rel=1e-3)


def test_of_an_untied_pair_vllm_reads_a_quantised_head(tmp_path):
    _, done, outcome = chosen_with_vocabulary(tmp_path, UNTIED, {"ratio": 0.45}, candidates=(4, 8), group_size=32)
    written = export(done, tmp_path / "export", "compressed-tensors", torch.float16, 10**9)
    assert [each["name"] for each in outcome.facts["units"] if each["block"] is None] == ["lm_head"]
    assert "model.embed_tokens" not in done.schemes
    assert written.bytes == outcome.facts["linear_bytes"] + outcome.facts["other_bytes"]
    assert written.bytes <= 0.45 * Checkpoint(tmp_path / "model").weight_bytes


def check_of(folder, sizes, stage):
    from compress.steps.shapes import Shape

    random_model("llama", folder, torch.float16, **sizes)
    shape = Shape(Checkpoint(folder).config)
    return stage.check(shape.everything, shape.architecture)


@pytest.mark.parametrize(
    ("sizes", "fields", "said"),
    [
        (TIED, {"candidates": (4, 8)}, "holds model.embed_tokens in 16 bits only"),
        (UNTIED, {"candidates": (4, 8), "ignore": ("lm_head",)}, "nothing to choose for lm_head"),
        (UNTIED, {"candidates": (16, {"bits": 8, "inputs": "int8"})}, "nothing to choose for lm_head"),
    ],
)
def test_where_nothing_can_be_chosen_for_a_vocabulary_that_is_said(tmp_path, sizes, fields, said):
    (mistake,) = check_of(tmp_path / "model", sizes, Sensitivity(group_size=32, vocabulary=True, **fields))
    assert said in mistake


@pytest.mark.parametrize("runtime", ["vllm", "llama.cpp"])
def test_an_untied_head_is_checked_like_linears(tmp_path, runtime):
    stage = Sensitivity(candidates=(4, 8), group_size=32, vocabulary=True, runtime=runtime)
    assert check_of(tmp_path / "model", UNTIED, stage) == []
    wide = Sensitivity(candidates=(4, 8), group_size=48, vocabulary=True, overrides=({"match": "*", "group_size": 32},))
    assert check_of(tmp_path / "again", UNTIED, wide) == []
    undivided = Sensitivity(candidates=(4, {"bits": 8, "group_size": 60}), group_size=32, vocabulary=True)
    assert any("lm_head" in each and "do not divide" in each for each in check_of(tmp_path / "m", UNTIED, undivided))


def test_candidates_that_an_override_makes_the_same_are_solved_once(model, tmp_path, monkeypatch):
    fields = {**FIELDS, "candidates": (4, {"bits": 4, "group_size": 16}, 8), "alone_tokens": 0}
    fields["overrides"] = ({"match": "*.o_proj", "group_size": 16},)
    asked = []
    plain = sensitivity_block.solve
    monkeypatch.setattr(
        sensitivity_block, "solve", lambda *args, **named: (asked.append(args[3].label), plain(*args, **named))[1]
    )

    apply_stage(Sensitivity(**fields), model, tmp_path / "solved", WINDOWS)

    # Four groups of linears in each of two blocks; o_proj has no other size than 16.
    assert len(asked) == 2 * (4 * 3 - 1)
    rows = candidates_in(tmp_path / "solved", 2)["model.layers.0.self_attn.o_proj"]
    assert rows[0] == rows[1] != rows[2]
    schemes = {
        name: [Scheme.from_json(row["scheme"]) for row in rows]
        for name, rows in candidates_in(tmp_path / "solved", 2).items()
    }
    first, second = (Assigned(tmp_path / "solved", schemes, dict.fromkeys(schemes, number)) for number in (0, 1))
    assert torch.equal(first.dense("model.layers.0.self_attn.o_proj"), second.dense("model.layers.0.self_attn.o_proj"))


def test_linears_may_stay_in_16_bits(model, tmp_path):
    fields = {**FIELDS, "candidates": (4, 16)}
    apply_stage(Sensitivity(**fields), model, tmp_path / "solved", WINDOWS)
    for rows in candidates_in(tmp_path / "solved", 2).values():
        assert rows[1]["scheme"] is None and rows[1]["cost"] == 0 and rows[1]["bytes"] > rows[0]["bytes"]
    stage = MixedPrecision(**fields, budget={"effective_bits": 9}, probes=2, proposals=2)
    planned, outcome = apply_stage(stage, tmp_path / "solved", tmp_path / "plan", WINDOWS, origin=model)
    done, _ = apply_stage(Gptq(bits="planned"), tmp_path / "plan", tmp_path / "done", WINDOWS, origin=model)
    assert 0 < len(planned.precision_plan) < 14 and done.schemes == planned.precision_plan
    kept = {unit["scheme"] for unit in outcome.facts["units"]}
    assert kept == {"int4 symmetric group 32", "16 bits"} and outcome.facts["effective_bits"] <= 9
    source = Checkpoint(model)
    untouched = [name for name in source.names if name.endswith("proj.weight") and name[:-7] not in done.schemes]
    assert untouched and all(torch.equal(done.read(name), source.read(name)) for name in untouched)


def test_integer_inputs_are_a_candidate_and_cost_more_than_the_same_weights_alone(model, tmp_path):
    eight = {"bits": 8, "group_size": "channel"}
    fields = {**FIELDS, "candidates": (4, eight, {"bits": 8, "inputs": "int8"})}
    apply_stage(Sensitivity(**fields), model, tmp_path / "solved", WINDOWS)
    found = candidates_in(tmp_path / "solved", 2)
    assert all(rows[2]["cost"] > rows[1]["cost"] for rows in found.values())
    schemes = {module: [Scheme.from_json(each["scheme"]) for each in rows] for module, rows in found.items()}
    assert {rows[2].inputs for rows in schemes.values()} == {8}
    text = random_windows(count=64, seed=5)
    before = our_logits(model, text).log_softmax(-1)
    whole = [
        float(
            (
                before.exp()
                * (
                    before
                    - _logits(Assigned(tmp_path / "solved", schemes, dict.fromkeys(found, k)), text).log_softmax(-1)
                )
            )
            .sum(-1)
            .mean()
        )
        for k in (1, 2)
    ]
    predicted = [sum(rows[k]["cost"] for rows in found.values()) for k in (1, 2)]
    assert whole[1] > 1.5 * whole[0] and predicted[1] > 1.5 * predicted[0]
    assert 0.4 < whole[1] / predicted[1] < 2.5


def test_a_plan_with_integer_inputs_is_followed(model, tmp_path):
    fields = {**FIELDS, "candidates": (4, {"bits": 8, "inputs": "int8"})}
    apply_stage(Sensitivity(**fields), model, tmp_path / "solved", WINDOWS)
    stage = MixedPrecision(**fields, budget={"effective_bits": 6.5}, probes=2, proposals=2)
    planned, _ = apply_stage(stage, tmp_path / "solved", tmp_path / "plan", WINDOWS, origin=model)
    done, _ = apply_stage(Gptq(bits="planned"), tmp_path / "plan", tmp_path / "done", WINDOWS, origin=model)
    assert {scheme.inputs for scheme in planned.precision_plan.values()} == {None, 8}
    assert done.schemes == planned.precision_plan


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        ({"bits": 16, "group_size": 32}, "leaves a linear as it is"),
        ({"bits": 7}, "Input should be 2, 3, 4, 5, 6, 8 or 16"),
    ],
)
def test_candidates_that_mean_nothing_are_refused(candidate, said):
    with pytest.raises(ValueError, match=said):
        Sensitivity(candidates=(4, candidate))


def test_integer_inputs_go_with_a_scale_a_row(model):
    checkpoint = Checkpoint(model)
    shapes = Skeleton(checkpoint.config, CPU, torch.float32).linear_shapes()
    stage = Sensitivity(candidates=(4, {"bits": 8, "inputs": "int8", "group_size": 32}), group_size=32)
    assert any("int8 inputs go with bits: 8" in each for each in stage.check(shapes, checkpoint.architecture))


# --- the smallest within bounds --------------------------------------------------------------------------------------


def first_pass(solved, folder, model, **fields):
    return choose(solved, folder, model, stop="first_pass", **{"probes": 4, "proposals": 3, **fields})


@pytest.mark.parametrize("max_kl", [1e-3, 1e-2, 4e-2])
def test_the_smallest_within_a_bound_is_within_it_and_smaller_than_any_uniform_one(solved, model, tmp_path, max_kl):
    _, outcome = first_pass(solved, tmp_path / "out", model, bounds={"max_kl": max_kl}, share_of_bounds=1)
    facts = outcome.facts
    assert facts["kl"] <= max_kl
    within = [each["bytes"] for each in facts["uniform"] if each["kl"] <= max_kl]
    assert all(facts["linear_bytes"] <= size for size in within)
    smaller, looser = first_pass(solved, tmp_path / "looser", model, bounds={"max_kl": 3 * max_kl}, share_of_bounds=1)
    assert looser.facts["linear_bytes"] < facts["linear_bytes"] and smaller.precision_plan


def test_where_no_mixture_is_smaller_the_uniform_one_is_kept_and_said(solved, model, tmp_path):
    """The bound is what the smallest candidate everywhere has: nothing is smaller."""
    bounds = {"max_kl": 1.0}
    _, outcome = first_pass(solved, tmp_path / "out", model, bounds=bounds, share_of_bounds=1)
    (event,) = outcome.events
    assert outcome.facts["plan"] == "uniform" and event.kind == "uniform_kept"
    assert event.message.endswith("and no mixture that was measured does in fewer: the plan is uniform")
    assert outcome.facts["linear_bytes"] == min(each["bytes"] for each in outcome.facts["uniform"])


def test_only_a_share_of_the_bounds_is_used(solved, model, tmp_path):
    _, outcome = first_pass(solved, tmp_path / "out", model, bounds={"max_kl": 2e-2}, share_of_bounds=0.5)
    assert outcome.facts["kl"] <= 1e-2
    _, outcome = first_pass(solved, tmp_path / "p", model, bounds={"max_perplexity_ratio": 1.02}, share_of_bounds=0.5)
    assert outcome.facts["perplexity_ratio"] <= 1.01


def test_a_budget_is_the_most_that_the_smallest_may_be(solved, model, tmp_path):
    with pytest.raises(RecipeError, match=r"nothing measured stays within 0\.8 of a mean KL"):
        first_pass(solved, tmp_path / "out", model, bounds={"max_kl": 1e-7}, budget={"effective_bits": 4})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "give a budget, or stop: first_pass"),
        ({"budget": {"ratio": 0.5}, "bounds": {"max_kl": 1}}, "belong to stop: first_pass"),
        ({"budget": {"ratio": 0.5}, "share_of_bounds": 0.5}, "belong to stop: first_pass"),
        ({"budget": {"ratio": 0.5}, "candidates": (4, 4)}, "named twice"),
        ({"stop": "first_pass", "bounds": {}}, "bound nothing"),
    ],
)
def test_a_choice_needs_something_to_stop_at(fields, said):
    with pytest.raises(ValueError, match=said):
        MixedPrecision(**fields)


def test_two_that_measure_at_once_keep_what_both_have_measured(solved, model, tmp_path):
    from compress.stages.choices import Choices

    stage = MixedPrecision(**FIELDS, budget={"effective_bits": 4.5})
    context = stage_context(solved, tmp_path / "out", WINDOWS, origin=model)
    one, other = (Choices(stage, context, tmp_path / "measured.json") for _ in range(2))
    one.judge(one.uniforms()[0])
    other.judge(other.uniforms()[1])
    assert Choices(stage, context, tmp_path / "measured.json").measured == 2
