"""Structured pruning on small random models of every architecture, and on glass: exact surgery, repair, kills."""

from __future__ import annotations

import json

import pytest
import torch

from compress.architecture import architecture_of
from compress.calibration.texts import SelfGenerated
from compress.calibration.window_specs import WindowSpec
from compress.calibration.windows import HELD_OUT, Windows
from compress.checkpoints.export import export
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Skeleton
from compress.errors import RecipeError
from compress.evaluation.measure import score, walk_states
from compress.events import Quiet
from compress.pruning.counts import Target
from compress.stages import StructuredPrune
from compress.training.material import material
from tests.tiny import (
    CONFIGS,
    CPU,
    apply_stage,
    load_publicly,
    our_logits,
    random_model,
    random_windows,
    stage_context,
    their_logits,
)

ABLE = [name for name in CONFIGS if name != "gpt2"]


def changes_for(name):
    """Three blocks, so that one can go; lists of a config have an entry for each."""
    changes = {"n_layer": 3} if name == "gpt2" else {"num_hidden_layers": 3}
    given = CONFIGS[name]
    if "layer_types" in given:
        changes["layer_types"] = [*given["layer_types"], "full_attention"]
    if "no_rope_layers" in given:
        changes["no_rope_layers"] = [1, 0, 1]
    return changes


def silenced(name, folder, channels, heads):
    """A random model in which some MLP channels and KV heads have no effect, because nothing reads them."""
    model = random_model(name, folder, **changes_for(name))
    architecture = architecture_of(model.config)
    for index in range(3):
        block = model.get_submodule(architecture.block_name(index))
        mlp = block.get_submodule(architecture.mlp_channels.reader).weight.data
        (mlp.T if not architecture.transposed_linears else mlp)[channels] = 0
        if architecture.kv_heads and heads:
            attention = block.get_submodule(architecture.kv_heads.reader).weight.data
            width = attention.shape[1] // 2
            for head in heads:
                attention[:, head * width : (head + 1) * width] = 0
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padded", [False, True])
def test_pieces_without_effect_go_and_the_logits_stay(name, padded, tmp_path):
    """Nothing but rounding: the right pieces are found, and every tensor is sliced where it should be."""
    heads = [] if name == "gpt2" else [1]
    model = silenced(name, tmp_path / "source", list(range(5, 37)), heads)
    windows = random_windows(40, 24, padded=padded)
    stage = StructuredPrune(mlp_channels=64, kv_heads=1 if heads else None)

    done, outcome = apply_stage(stage, tmp_path / "source", tmp_path / "stage", windows)

    export(done, tmp_path / "model", "plain", torch.float32, 10**9)
    public = load_publicly(tmp_path / "model")
    real = slice(None) if windows.mask is None else windows.mask.bool()
    before = their_logits(model, windows)[real]
    for after in (their_logits(public, windows)[real], our_logits(done.folder, windows)[real]):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    counts = outcome.facts["counts"]
    assert counts["mlp_channels"] == [96, 64] and counts["blocks"] == [3, 3]
    assert outcome.facts["parameters"][1] == sum(parameter.numel() for parameter in set(public.parameters()))
    assert not [event for event in outcome.events if event.kind != "few_calibration_tokens"]


def test_windows_to_fit_to_and_to_judge_by_are_both_left_where_blocks_go():
    for seed in range(200):
        fitted, held_out, tuning = StructuredPrune(blocks=1, tuning_windows=14).split(random_windows(16), seed)

        assert held_out is not None and tuning is not None
        assert (len(fitted.ids), len(held_out.ids), len(tuning.ids)) == (1, 1, 14), seed


@pytest.mark.parametrize("name", CONFIGS)
def test_what_plan_predicts_is_what_comes_out(name, tmp_path):
    random_model(name, tmp_path / "source", **changes_for(name))
    stage = StructuredPrune(mlp_channels=72, kv_heads=None if name == "gpt2" else 1, blocks=2, tuning_windows=2)

    done, outcome = apply_stage(stage, tmp_path / "source", tmp_path / "stage", random_windows(40))

    predicted = stage.configured(Checkpoint(tmp_path / "source").config, 2)
    lists = ("layer_types", "no_rope_layers", "max_window_layers")
    assert {k: v for k, v in done.config.items() if k not in lists} == {
        k: v for k, v in predicted.items() if k not in lists
    }
    shapes = Skeleton(predicted, CPU, torch.float32).parameter_shapes()
    assert {key: done.header(key)[1] for key in shapes} == shapes
    (gone,) = outcome.facts["removed_blocks"]
    staying = [index for index in range(3) if index != gone["block"]]
    for key in ("layer_types", "no_rope_layers"):
        if key in CONFIGS[name]:
            assert done.config[key] == [changes_for(name)[key][index] for index in staying]
    export(done, tmp_path / "model", "plain", torch.float32, 10**9)
    windows = random_windows(3)
    torch.testing.assert_close(
        their_logits(load_publicly(tmp_path / "model"), windows), our_logits(done.folder, windows), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_refitting_beats_leaving_what_stays_alone(name, tmp_path):
    """Random weights, half the channels: least squares lowers the divergence, alone and following the source."""
    random_model(name, tmp_path / "source")
    windows, judged = random_windows(60), random_windows(12, seed=9)
    found = {}
    for label, fields in {
        "nothing": {"compensate": False},
        "alone": {"follow_source": False},
        "following": {},
    }.items():
        done, _ = apply_stage(
            StructuredPrune(mlp_channels=48, **fields), tmp_path / "source", tmp_path / label, windows
        )
        found[label] = divergence(tmp_path / "source", done.folder, judged)
    assert found["alone"] < found["nothing"] and found["following"] < found["nothing"], found


def divergence(source, candidate, windows):
    sets = {"text": windows}
    pairs = [
        (Checkpoint(folder), walk_states(Checkpoint(folder), sets, CPU, torch.float32, 96, Quiet(), ""))
        for folder in (source, candidate)
    ]
    scores = score(pairs[0], pairs[1], sets, CPU, torch.float32, Quiet())["text"]
    return float(scores.divergence[scores.counts].double().mean())


@pytest.fixture(scope="module")
def text(glass):
    from transformers import AutoTokenizer

    from compress.calibration.self_generated import sample_windows

    spec = WindowSpec(data=SelfGenerated(), windows=48, window_tokens=96)
    return sample_windows(spec, Checkpoint(glass), AutoTokenizer.from_pretrained(glass), 1, CPU, Quiet())


def test_on_a_trained_model_each_step_of_repair_helps(glass, text, tmp_path):
    found = {}
    for label, fields in {
        "magnitude": {"importance": "magnitude", "compensate": False},
        "obs": {"compensate": False},
        "refitted": {"follow_source": False},
        "following": {},
        "multiplied in bfloat16": {"products": "bfloat16"},
    }.items():
        stage = StructuredPrune(mlp_channels=256, **fields)
        done, _ = apply_stage(stage, glass, tmp_path / label, text.part(0, 40))
        found[label] = divergence(glass, done.folder, text.part(40, 48))
    assert found["following"] < found["refitted"] < found["obs"] < found["magnitude"], found
    assert 0 < abs(found["multiplied in bfloat16"] / found["following"] - 1) < 0.05, found


def test_the_block_that_goes_is_the_one_without_effect(tmp_path):
    """A block whose two outputs are zero passes its input on: removing it changes nothing, and it is found."""
    model = random_model("llama", tmp_path / "source", num_hidden_layers=4)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        linear = model.get_submodule(f"model.layers.2.{name}")
        linear.weight.data.zero_()
        linear.bias.data.zero_()
    model.save_pretrained(tmp_path / "source")
    windows = random_windows(20)
    stage = StructuredPrune(blocks=3, tuning_windows=3, compensate=False)

    done, outcome = apply_stage(stage, tmp_path / "source", tmp_path / "stage", windows)

    (removal,) = outcome.facts["removed_blocks"]
    assert removal["block"] == 2 and removal["kl"] < 1e-9 and removal["influence"] < 1e-6
    torch.testing.assert_close(our_logits(done.folder, windows), their_logits(model, windows), rtol=1e-4, atol=1e-4)


def test_depth_is_greedy_by_measured_divergence(tmp_path):
    """Against removing each block by hand."""
    random_model("llama", tmp_path / "source", num_hidden_layers=4)
    windows = random_windows(20)
    stage = StructuredPrune(blocks=2, tuning_windows=5, compensate=False)

    _, outcome = apply_stage(stage, tmp_path / "source", tmp_path / "stage", windows)

    staying, tuning = [0, 1, 2, 3], windows.part(15, 20)
    for step, removal in enumerate(outcome.facts["removed_blocks"]):
        kls = {}
        for gone in staying:
            folder = tmp_path / f"without-{step}-{gone}"
            _by_hand(tmp_path / "source", [index for index in staying if index != gone], folder)
            kls[gone] = divergence(tmp_path / "source", folder, tuning)
        assert removal["block"] == min(kls, key=kls.get)
        assert removal["kl"] == pytest.approx(kls[removal["block"]], rel=1e-4)
        staying.remove(removal["block"])


def _by_hand(source, staying, folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in staying)
    model.config.num_hidden_layers = len(staying)
    model.save_pretrained(folder)


@pytest.mark.parametrize(("stops_after", "products"), [(0, "float32"), (1, "float32"), (1, "bfloat16")])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, stops_after, products):
    random_model("llama", tmp_path / "source", num_hidden_layers=4)
    windows = random_windows(40)
    stage = StructuredPrune(mlp_channels=72, kv_heads=1, blocks=3, tuning_windows=2, products=products)
    whole, _ = apply_stage(stage, tmp_path / "source", tmp_path / "whole", windows)

    class Killed(Exception):
        pass

    def kill(index):
        if index == stops_after:
            raise Killed

    def context(after_block):
        return stage_context(tmp_path / "source", tmp_path / "halves", windows, after_block=after_block)

    with pytest.raises(Killed):
        stage.apply(context(kill))
    assert (tmp_path / "halves" / "scratch" / "removed.json").is_file()
    outcome = stage.apply(context(lambda index: None))

    halves = Checkpoint(tmp_path / "halves")
    assert halves.names == whole.names
    assert all(torch.equal(halves.read(name), whole.read(name)) for name in whole.names)
    assert len(outcome.facts["pruned"]) == 6


def test_half_precision_weights_stay_in_it(tmp_path):
    random_model("qwen3", tmp_path / "source", dtype=torch.bfloat16)
    done, _ = apply_stage(StructuredPrune(mlp_channels=64), tmp_path / "source", tmp_path / "stage", random_windows(40))

    assert {done.header(name)[0] for name in done.names} == {"BF16"}


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("gpt2", {"kv_heads": 1}, r"heads: the config of gpt2 cannot express .* Parts that can be pruned: depth, mlp"),
        ("llama", {"kv_heads": 3}, "kv_heads: 3 should stay, and the model has 2"),
        ("llama", {"blocks": 2}, "nothing goes"),
        ("llama", {"target": Target(ratio=0.9), "parts": ("heads",)}, "taking from heads leaves at least"),
        ("llama", {"target": Target(ratio=0.2), "mlp_channels": 64}, "every part that it could be taken from is given"),
        ("llama", {"target": Target(parameters=1000)}, "alone takes 20,544 parameters"),
    ],
)
def test_what_cannot_be_is_said_with_what_can(name, fields, sentence, tmp_path):
    random_model(name, tmp_path / "source")
    with pytest.raises(RecipeError, match=sentence):
        StructuredPrune(**fields).configured(json.loads((tmp_path / "source" / "config.json").read_text()), 2)


def test_a_stage_that_says_nothing_is_refused():
    with pytest.raises(ValueError, match="say how much goes"):
        StructuredPrune()


@pytest.mark.parametrize("follow", [True, False])
def test_the_windows_that_recover_keeps_out_are_kept_for_those_who_judge_afterwards(tmp_path, follow):
    """An eighth of the text decides no weight, except how far the source is followed; `recover` judges by it."""
    random_model("llama", tmp_path / "source")
    windows, others = random_windows(40), random_windows(40, seed=11)
    judging = material(windows, None, HELD_OUT, 24, seed=0).held_out
    ids = windows.ids.clone()
    ids[judging] = others.ids[judging]
    found = []
    for name, text in (("one", windows), ("other", Windows(ids, None, {}))):
        stage = StructuredPrune(mlp_channels=64, follow_source=follow)
        found.append(apply_stage(stage, tmp_path / "source", tmp_path / name, text)[0])

    same = [torch.equal(found[0].read(name), found[1].read(name)) for name in found[0].names]
    assert len(judging) == 5 and all(same) is not follow
