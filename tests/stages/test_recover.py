"""The recover stage on small models: closer to the source, never further; exact about what ships; killed, resumed."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from compress.calibration.self_generated import sample_windows
from compress.calibration.texts import SelfGenerated
from compress.calibration.window_specs import WindowSpec
from compress.calibration.windows import Windows
from compress.checkpoints.export import export
from compress.checkpoints.reader import Checkpoint
from compress.evaluation.measure import score, walk_states
from compress.events import Quiet
from compress.memory.measure import PeakSampler
from compress.stages import Gptq, Recover, RoundToNearest, SmoothQuant, StructuredPrune, Vocabulary
from compress.steps.environment import Machine
from compress.steps.fold import fold
from compress.training import clock, descent, footprint, quantised, student, whole_model
from compress.training.material import material
from tests.tiny import CONFIGS, CPU, apply_stage, random_model, random_windows, stage_context

STORED = torch.float16


@pytest.fixture(scope="module")
def text(glass):
    from transformers import AutoTokenizer

    spec = WindowSpec(data=SelfGenerated(), windows=96, window_tokens=96)
    return sample_windows(spec, Checkpoint(glass), AutoTokenizer.from_pretrained(glass), 1, CPU, Quiet())


@pytest.fixture(scope="module")
def solved(glass, text, tmp_path_factory):
    """glass in 3 bits, by gptq without what makes it so good that little is left to train."""
    folder = tmp_path_factory.mktemp("glass-gptq")
    apply_stage(Gptq(bits=3, group_size="channel", output_tokens=0), glass, folder, text)
    return folder


@pytest.fixture(scope="module")
def recovered(glass, solved, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("glass-recovered")
    return apply_stage(STAGE, solved, folder, text, origin=glass)


STAGE = Recover(epochs=3, batch_tokens=384, learning_rate=2e-3)


def divergence(source, candidate, windows):
    """Mean KL in nats by the evaluation, which knows nothing of training."""
    sets = {"text": windows}
    pairs = [
        (Checkpoint(folder), walk_states(Checkpoint(folder), sets, CPU, torch.float32, 96, Quiet(), ""))
        for folder in (source, candidate)
    ]
    scores = score(pairs[0], pairs[1], sets, CPU, torch.float32, Quiet())["text"]
    return float(scores.divergence[scores.counts].double().mean())


def held_out(windows, stage=STAGE):
    rows = material(windows, None, stage.share_held_out(windows.tokens), stage.batch_tokens, seed=0).held_out
    return Windows(windows.ids[rows], None if windows.mask is None else windows.mask[rows], windows.ledger)


def test_training_brings_a_three_bit_model_closer_to_its_source(recovered):
    _, outcome = recovered

    assert outcome.facts["mode"] == "model" and outcome.events == []
    assert outcome.facts["held_out_kl_after"] < 0.97 * outcome.facts["held_out_kl_before"]


def test_what_was_measured_is_what_an_export_computes(glass, solved, recovered, text, tmp_path):
    """Codes and scales as stored: the evaluation finds the recorded divergence in the exported folder."""
    done, outcome = recovered
    export(done, tmp_path / "model", "compressed-tensors", STORED, 10**9)

    for folder, key in ((solved, "before"), (tmp_path / "model", "after")):
        found = divergence(glass, folder, held_out(text))
        assert found == pytest.approx(outcome.facts[f"held_out_kl_{key}"], rel=1e-5)


def test_integers_stay_and_scales_and_norms_change(glass, solved, recovered):
    before, (after, outcome) = Checkpoint(solved), recovered

    assert after.names == before.names and after.schemes == before.schemes
    changed = {name.rpartition(".")[2] for name in after.names if not torch.equal(after.read(name), before.read(name))}
    assert changed == {"scale", "weight"}
    for name in after.names:
        if not torch.equal(after.read(name), before.read(name)):
            assert name.endswith((".scale", "norm.weight")), name
            assert after.read(name).dtype is STORED
    assert not torch.equal(after.read("model.norm.weight"), before.read("model.norm.weight"))
    assert len(outcome.modules) == len(after.schemes)


def test_scales_alone_leave_the_norms(glass, solved, text, tmp_path):
    stage = Recover(train="scales", epochs=1, batch_tokens=384, learning_rate=2e-3)

    done, outcome = apply_stage(stage, solved, tmp_path / "stage", text, origin=glass)

    before = Checkpoint(solved)
    plain = [name for name in before.names if not name.endswith(".scale")]
    assert all(torch.equal(done.read(name), before.read(name)) for name in plain)
    assert outcome.facts["held_out_kl_after"] < outcome.facts["held_out_kl_before"]


def test_block_by_block_lowers_each_blocks_error_and_the_divergence(glass, solved, text, tmp_path):
    stage = Recover(mode="block", epochs=2, batch_tokens=384, learning_rate=3e-3)

    done, outcome = apply_stage(stage, solved, tmp_path / "stage", text, origin=glass)

    assert outcome.facts["mode"] == "block"
    for block in outcome.facts["blocks"]:
        assert block["error_after"] < 0.99 * block["error_before"]
    assert outcome.facts["held_out_kl_after"] < outcome.facts["held_out_kl_before"]
    assert divergence(glass, done.folder, held_out(text)) == pytest.approx(outcome.facts["held_out_kl_after"], rel=1e-4)


def test_a_model_that_does_not_fit_is_trained_block_by_block_with_an_event(glass, solved, text, tmp_path, monkeypatch):
    monkeypatch.setattr(footprint, "free_bytes", lambda device: 10**6)

    _, outcome = apply_stage(Recover(epochs=1, batch_tokens=960), solved, tmp_path / "stage", text, origin=glass)

    assert outcome.facts["mode"] == "block"
    (event,) = [event for event in outcome.events if event.kind == "recover_block_wise"]
    assert "1,000,000 were free" in event.message


def test_codes_whose_training_does_not_fit_stay_with_an_event(glass, solved, text, tmp_path, monkeypatch):
    """Scales and norms of the whole model rather than codes block by block; a killed run goes on with that."""
    stage = Recover(train="codes", epochs=1, batch_tokens=960)
    monkeypatch.setattr(footprint, "free_bytes", lambda device: 60 * 10**6)
    with pytest.raises(KeyboardInterrupt):
        apply_stage(stage, solved, tmp_path / "stage", text, origin=glass, progress=Killing(2))
    monkeypatch.setattr(footprint, "free_bytes", lambda device: 10**10)

    done, outcome = apply_stage(stage, solved, tmp_path / "stage", text, origin=glass)

    assert (outcome.facts["mode"], outcome.facts["train"]) == ("model", "scales+norms")
    (event,) = [event for event in outcome.events if event.kind == "recover_trained_less"]
    assert "60,000,000 were free: scales+norms were trained" in event.message
    before = Checkpoint(solved)
    assert all(torch.equal(done.read(name), before.read(name)) for name in _codes(done))
    assert "codes_changed" not in outcome.facts


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_what_is_kept_inside_blocks_changes_no_bit(glass, solved, text, tmp_path, monkeypatch, products):
    """As many blocks as a quarter of free memory has room for keep their inside; the others compute it twice."""
    stage = Recover(epochs=1, batch_tokens=960, products=products)
    computed_again, results = [], []
    again = whole_model.recomputed

    def recomputed(*args, **kwargs):
        computed_again.append(1)
        return again(*args, **kwargs)

    monkeypatch.setattr(whole_model, "recomputed", recomputed)
    for share in (0.25, 0.0):
        monkeypatch.setattr(footprint, "SHARE_INSIDE", share)
        done, _ = apply_stage(stage, solved, tmp_path / f"{share}", text, origin=glass)
        results.append((len(computed_again), {name: done.read(name) for name in done.names}))

    (kept_calls, kept), (calls, recalculated) = results
    assert kept_calls == 0 and calls >= done.config["num_hidden_layers"]
    assert all(torch.equal(kept[name], recalculated[name]) for name in kept)


@pytest.mark.parametrize("mode", ["model", "block"])
def test_steps_that_only_do_harm_ship_the_input_unchanged(glass, solved, text, tmp_path, mode):
    stage = Recover(learning_rate=1e3, epochs=1, batch_tokens=960, mode=mode)

    done, outcome = apply_stage(stage, solved, tmp_path / "stage", text, origin=glass)

    assert [event.kind for event in outcome.events] == ["recover_kept_input"]
    assert outcome.facts["held_out_kl_after"] == outcome.facts["held_out_kl_before"]
    before = Checkpoint(solved)
    assert done.names == before.names
    assert all(torch.equal(done.read(name), before.read(name)) for name in done.names)


class Killing(Quiet):
    """Progress that ends the run at the given call of the stage's own task."""

    def __init__(self, calls):
        self.calls = calls

    @contextmanager
    def task(self, label, total):
        def advance(note=""):
            if label == "recover":
                self.calls -= 1
                if self.calls == 0:
                    raise KeyboardInterrupt

        yield advance


@pytest.mark.parametrize(("mode", "kills"), [("model", (1, 7)), ("block", (3, 11))])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, mode, kills):
    monkeypatch.setattr(descent, "SECONDS_BETWEEN_SAVES", -1.0)
    monkeypatch.setattr(descent, "SAVING_SHARE", 0.0)
    # A second passes whenever somebody looks, so that everything that is timed takes one.
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=map(float, itertools.count()).__next__))
    random_model("llama", tmp_path / "model")
    apply_stage(RoundToNearest(bits=3, group_size=32), tmp_path / "model", tmp_path / "rounded")
    stage, windows = Recover(mode=mode, epochs=4, batch_tokens=48), random_windows(count=8)

    def run(name, progress=None):
        return apply_stage(
            stage, tmp_path / "rounded", tmp_path / name, windows, origin=tmp_path / "model", progress=progress
        )

    _, whole = run("whole")
    for calls in kills:
        with pytest.raises(KeyboardInterrupt):
            run("killed", Killing(calls))
    _, again = run("killed")

    assert again.facts == whole.facts
    assert [event.kind for event in again.events] == ["training_resumed"]
    for part in ("training", "held-out", "teacher"):
        assert again.seconds_by_part[part] >= whole.seconds_by_part[part] > 0
    assert again.seconds_by_part["training"] == whole.seconds_by_part["training"], "every step counts once"
    assert again.seconds_before > whole.seconds_before == 0
    assert not (tmp_path / "killed" / "scratch").exists()
    paths = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert paths == sorted(path.name for path in (tmp_path / "killed").iterdir()), "nothing is left of the training"
    for name in paths:
        if name.endswith(".safetensors"):
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_architecture_trains_with_its_own_code(name, tmp_path):
    """Padded windows, conv-shaped linears, norms that add one, soft caps, tied heads: the evaluation agrees."""
    random_model(name, tmp_path / "model")
    apply_stage(RoundToNearest(bits=3, group_size=32), tmp_path / "model", tmp_path / "rounded", stored=torch.bfloat16)
    windows = random_windows(count=8, padded=True)
    stage = Recover(epochs=6, batch_tokens=72, learning_rate=3e-3, holdout=0.4)

    done, outcome = apply_stage(
        stage, tmp_path / "rounded", tmp_path / "stage", windows, stored=torch.bfloat16, origin=tmp_path / "model"
    )

    export(done, tmp_path / "export", "plain", torch.bfloat16, 10**9)
    found = divergence(tmp_path / "model", tmp_path / "export", held_out(windows, stage))
    assert found == pytest.approx(outcome.facts["held_out_kl_after"], rel=1e-3)
    assert outcome.facts["held_out_kl_after"] < outcome.facts["held_out_kl_before"]


def test_bfloat16_arithmetic_trains_too(tmp_path):
    """As on a GPU whose model is bfloat16; the trained numbers themselves stay float32 while they train."""
    random_model("gemma2", tmp_path / "model", torch.bfloat16)
    model, rounded = tmp_path / "model", tmp_path / "rounded"
    apply_stage(RoundToNearest(bits=3, group_size=32), model, rounded, stored=torch.bfloat16)

    for mode in ("model", "block"):
        stage = Recover(epochs=4, batch_tokens=48, learning_rate=5e-3, holdout=0.4, mode=mode)
        _, outcome = apply_stage(
            stage,
            rounded,
            tmp_path / mode,
            random_windows(count=8),
            stored=torch.bfloat16,
            origin=model,
            compute=torch.bfloat16,
        )
        assert outcome.facts["held_out_kl_after"] < 0.97 * outcome.facts["held_out_kl_before"]


def test_padding_never_counts(tmp_path):
    """Other token ids under the padding change no trained value."""
    random_model("llama", tmp_path / "model")
    apply_stage(RoundToNearest(bits=3, group_size=32), tmp_path / "model", tmp_path / "rounded")
    windows = random_windows(count=8, padded=True)
    other = Windows(windows.ids + (1 - windows.mask) * 77, windows.mask, windows.ledger)
    for name, each in (("zeros", windows), ("others", other)):
        apply_stage(
            Recover(epochs=2, batch_tokens=72), tmp_path / "rounded", tmp_path / name, each, origin=tmp_path / "model"
        )

    first, second = (load_file(tmp_path / name / "block-00001.safetensors") for name in ("zeros", "others"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_text_sampled_from_the_source_is_recorded(glass, solved, text, tmp_path):
    stage = Recover(self_generated_windows=4, epochs=1, batch_tokens=960)

    _, outcome = apply_stage(stage, solved, tmp_path / "stage", text, origin=glass)

    ledger = outcome.facts["self_generated"]
    assert outcome.facts["windows_training"] == 84 + 4 and outcome.facts["windows_held_out"] == 12
    assert ledger["tokens_obtained"] == 4 * 96
    assert ledger["digest"] != text.digest and len(ledger["digest"]) == 64
    assert outcome.facts["held_out_from"] == "calibration"


def test_after_quantising_text_of_the_models_own_judges(glass, solved, text, tmp_path):
    few = Windows(text.ids[:8], None if text.mask is None else text.mask[:8], text.ledger)
    stage = Recover(self_generated_windows=4, epochs=1, batch_tokens=960)

    _, outcome = apply_stage(stage, solved, tmp_path / "stage", few, origin=glass)

    assert outcome.facts["held_out_from"] == "self_generated"
    assert outcome.facts["windows_training"] == 8 + 3 and outcome.facts["windows_held_out"] == 1

    # Where nothing was quantised, and so nothing fitted to all windows, the calibration text judges.
    _, outcome = apply_stage(stage.model_copy(update={"train": "norms"}), glass, tmp_path / "other", few)
    assert outcome.facts["held_out_from"] == "calibration"


@pytest.mark.parametrize(
    ("products", "vocabulary", "wanted"),
    [("bfloat16", False, torch.bfloat16), ("float32", False, None), ("bfloat16", True, None)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_head_is_bfloat16_where_products_are_and_the_source_has_the_same(
    tmp_path, monkeypatch, products, vocabulary, wanted, dtype
):
    """A float32 source's head is rounded to float16 on its way; one in integers is another."""
    random_model("llama", tmp_path / "model", dtype)
    folder = tmp_path / "rounded"
    apply_stage(RoundToNearest(bits=3, group_size=32), tmp_path / "model", folder)
    if vocabulary:
        folder = tmp_path / "vocabulary"
        apply_stage(Vocabulary(bits=4, group_size=32), tmp_path / "rounded", folder)
    seen, real = set(), whole_model.mean_divergence

    def watched(teacher, student, narrow=None):
        seen.add(None if narrow is None else narrow.dtype)
        assert narrow is None or torch.equal(narrow, student[0].weight.bfloat16())
        return real(teacher, student, narrow)

    monkeypatch.setattr(whole_model, "mean_divergence", watched)
    stage = Recover(epochs=1, batch_tokens=48, products=products)
    apply_stage(stage, folder, tmp_path / "out", random_windows(count=8), origin=tmp_path / "model")
    assert seen == {wanted}


def test_each_training_of_a_recipe_samples_text_of_its_own(glass, solved, text, tmp_path):
    """What an earlier one has trained on must not judge the next."""
    stage, few = Recover(self_generated_windows=4, epochs=1, batch_tokens=960), Windows(text.ids[:8], None, text.ledger)
    texts = []
    for name, chain in (("first", ()), ("second", (Checkpoint(solved),))):
        _, outcome = apply_stage(stage, solved, tmp_path / name, few, origin=glass, chain=chain)
        texts.append(outcome.facts["self_generated"]["digest"])
    assert texts[0] != texts[1]


def test_a_run_killed_while_blocks_are_written_does_not_train_again(tmp_path):
    random_model("llama", tmp_path / "model")
    apply_stage(RoundToNearest(bits=3, group_size=32), tmp_path / "model", tmp_path / "rounded")
    stage, windows = Recover(epochs=2, batch_tokens=48), random_windows(count=8)

    def context(name, after_block=lambda index: None, progress=None):
        return stage_context(
            tmp_path / "rounded",
            tmp_path / name,
            windows,
            origin=tmp_path / "model",
            progress=progress,
            after_block=after_block,
        )

    def stop(index):
        raise KeyboardInterrupt

    whole = stage.apply(context("whole"))
    with pytest.raises(KeyboardInterrupt):
        stage.apply(context("stopped", stop))
    again = stage.apply(context("stopped", progress=Killing(1)))

    assert again.seconds_by_part["training"] > 0, "the killed run's"
    assert again.facts == whole.facts and [record["name"] for record in again.modules] == [
        record["name"] for record in whole.modules
    ]
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes(), path.name


@pytest.fixture(scope="module")
def pruned(glass, text, tmp_path_factory):
    """glass with a third fewer MLP channels, not refitted."""
    folder = tmp_path_factory.mktemp("glass-pruned")
    apply_stage(StructuredPrune(mlp_channels=224, compensate=False), glass, folder, text)
    return folder


@pytest.mark.parametrize("what", ["weights", "lora", "norms"])
def test_a_pruned_model_is_brought_back_towards_its_source(glass, pruned, text, tmp_path, what):
    """By what is trained, and nothing else; what was measured is what the written folder computes."""
    stage = Recover(train=what, epochs=2, batch_tokens=384, learning_rate=3e-3, hidden_share=0.1)

    done, outcome = apply_stage(stage, pruned, tmp_path / "stage", text, origin=glass)

    assert outcome.facts["mode"] == "model" and outcome.events == []
    before, after = outcome.facts["held_out_kl_before"], outcome.facts["held_out_kl_after"]
    assert after < {"weights": 0.75, "lora": 0.75, "norms": 0.98}[what] * before
    export(done, tmp_path / "model", "plain", STORED, 10**9)
    assert divergence(glass, tmp_path / "model", held_out(text, stage)) == pytest.approx(after, rel=2e-3)
    untrained = Checkpoint(pruned)
    assert done.names == untrained.names and done.config == untrained.config
    changed = {name for name in done.names if not torch.equal(done.read(name), untrained.read(name))}
    norms = {name for name in changed if name.endswith("norm.weight")}
    linears = {name for name in changed if ".mlp." in name or ".self_attn." in name}
    assert changed == norms | linears and norms
    assert len(linears) == (0 if what == "norms" else 4 * 7)


def test_codes_are_trained_with_straight_through_rounding(glass, text, tmp_path):
    """Quantisation-aware training at 2 bits, long enough for codes to move: further than scales and norms alone."""
    apply_stage(Gptq(bits=2, group_size="channel"), glass, tmp_path / "solved", text)
    fields = {"epochs": 8, "batch_tokens": 384, "learning_rate": 2e-3}
    solved = tmp_path / "solved"
    _, scales = apply_stage(Recover(**fields), solved, tmp_path / "scales", text, origin=glass)
    done, outcome = apply_stage(Recover(train="codes", **fields), solved, tmp_path / "codes", text, origin=glass)

    before = Checkpoint(solved)
    assert done.schemes == before.schemes
    moved = [int((done.read(name).int() - before.read(name).int()).abs().max()) for name in _codes(done)]
    assert max(moved) >= 1
    changed = sum(int((done.read(name) != before.read(name)).sum()) for name in _codes(done))
    share = changed / sum(done.read(name).numel() for name in _codes(done))
    assert outcome.facts["codes_changed"] == pytest.approx(share) and share > 0.001
    assert outcome.facts["held_out_kl_after"] < scales.facts["held_out_kl_after"]
    export(done, tmp_path / "model", "compressed-tensors", STORED, 10**9)
    found = divergence(glass, tmp_path / "model", held_out(text, Recover(**fields)))
    assert found == pytest.approx(outcome.facts["held_out_kl_after"], rel=1e-5)


def test_codes_start_from_the_weights_that_were_quantised(glass, text, tmp_path, monkeypatch):
    """Through the fold: behind smoothquant these are not the source's."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    seen = []

    def towards(codes, grid, weight):
        seen.append(weight)
        return quantised.towards(codes, grid, weight)

    monkeypatch.setattr(student, "towards", towards)
    stages = (SmoothQuant(), RoundToNearest(bits=4, group_size="channel"), Recover(train="codes", epochs=1))
    machine = Machine(CPU, torch.float32, 960)
    with PeakSampler() as sampler:
        folded = fold(stages, Checkpoint(glass), "0" * 64, text, 0, machine, STORED, Quiet(), sampler)

    smoothed, source = folded[0].checkpoint, Checkpoint(glass)
    names = [
        f"{source.architecture.block_name(index)}.{name}"
        for index in range(source.config["num_hidden_layers"])
        for name in source.architecture.linears
    ]
    assert all(torch.equal(weight, smoothed.matrix(name)) for weight, name in zip(seen, names, strict=True))
    assert any(not torch.equal(weight, source.matrix(name).float()) for weight, name in zip(seen, names, strict=True))


def _codes(checkpoint):
    return [name for name in checkpoint.names if name.endswith(".codes")]


@pytest.mark.parametrize("what", ["weights", "lora"])
def test_training_weights_goes_on_after_a_kill_to_the_same_bytes(tmp_path, monkeypatch, what):
    monkeypatch.setattr(descent, "SECONDS_BETWEEN_SAVES", -1.0)
    monkeypatch.setattr(descent, "SAVING_SHARE", 0.0)
    random_model("llama", tmp_path / "model")
    windows = random_windows(count=8)
    apply_stage(StructuredPrune(mlp_channels=64), tmp_path / "model", tmp_path / "pruned", windows)
    stage = Recover(train=what, epochs=3, batch_tokens=48)

    def run(name, progress=None):
        return apply_stage(
            stage, tmp_path / "pruned", tmp_path / name, windows, origin=tmp_path / "model", progress=progress
        )

    whole, _ = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", Killing(4))
    again, _ = run("killed")

    assert all(torch.equal(whole.read(name), again.read(name)) for name in whole.names)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_weights_of_every_architecture_train_behind_pruning(name, tmp_path):
    random_model(name, tmp_path / "model", num_hidden_layers=3) if name == "llama" else random_model(
        name, tmp_path / "model"
    )
    windows = random_windows(count=40, padded=True)
    fewer = {"blocks": 2, "tuning_windows": 4} if name == "llama" else {"mlp_channels": 48}
    stage = StructuredPrune(compensate=False, **fewer)
    apply_stage(stage, tmp_path / "model", tmp_path / "pruned", windows)
    stage = Recover(train="weights", epochs=3, batch_tokens=96, learning_rate=5e-4, holdout=0.2)

    done, outcome = apply_stage(stage, tmp_path / "pruned", tmp_path / "stage", windows, origin=tmp_path / "model")

    found = divergence(tmp_path / "model", done.folder, held_out(windows, stage))
    assert found == pytest.approx(outcome.facts["held_out_kl_after"], rel=2e-3)
    assert outcome.facts["held_out_kl_after"] < outcome.facts["held_out_kl_before"]


def test_block_by_block_trains_weights_of_a_narrower_model(glass, pruned, text, tmp_path):
    stage = Recover(train="weights", mode="block", epochs=1, batch_tokens=960, learning_rate=3e-3)

    _, outcome = apply_stage(stage, pruned, tmp_path / "stage", text, origin=glass)

    assert outcome.facts["held_out_kl_after"] < 0.95 * outcome.facts["held_out_kl_before"]


@pytest.mark.parametrize("fields", [{"epochs": 2, "batch_tokens": 384}, {"epochs": 1, "batch_tokens": 2048}])
def test_steps_are_known_beforehand(glass, solved, text, tmp_path, fields):
    stage = Recover(patience=100, **fields)

    _, outcome = apply_stage(stage, solved, tmp_path / "stage", text, origin=glass)

    assert outcome.facts["steps"] == stage.steps(*text.ids.shape)


def test_enough_is_kept_out_of_a_long_text_and_no_more():
    assert [Recover().share_held_out(tokens) for tokens in (1024, 65536, 131072)] == [0.125, 0.125, 0.0625]
    assert Recover(holdout=0.5).share_held_out(131072) == 0.5
    assert Recover(epochs=2).steps(256, 512) == 2 * (256 - 16) / 4


def test_codes_that_all_stayed_are_told(glass, solved, text, tmp_path):
    stage = Recover(train="codes", epochs=1, batch_tokens=960, learning_rate=1e-4)

    _, outcome = apply_stage(stage, solved, tmp_path / "stage", text, origin=glass)

    assert outcome.facts["codes_changed"] == 0.0
    assert "codes_unmoved" in {event.kind for event in outcome.events}
    assert stage.way_of_codes(*text.ids.shape) < 0.02 < Recover(train="codes").way_of_codes(*text.ids.shape)


def test_a_batch_is_no_larger_than_the_text(glass, solved, text, tmp_path):
    _, outcome = apply_stage(Recover(epochs=1, batch_tokens=10**9), solved, tmp_path / "stage", text, origin=glass)

    assert (outcome.facts["mode"], outcome.facts["steps"]) == ("model", 1)


@pytest.mark.parametrize("rate", [float("inf"), float("nan"), 0])
def test_a_rate_is_a_positive_number(rate):
    with pytest.raises(ValueError, match="learning_rate"):
        Recover(learning_rate=rate)
