"""Scales of an fp8 KV cache: transformers with compressed-tensors rounds keys and values by them, and is the oracle."""

from __future__ import annotations

import json

import pytest
import torch

from compress.architecture import architecture_of
from compress.checkpoints.export import export
from compress.checkpoints.reader import Checkpoint
from compress.quantization.kv_cache import LARGEST, RoundedCache, rounded, scale_of
from compress.stages import Gptq, KvCache, Vocabulary
from tests.tiny import apply_stage, config_of, load_publicly, our_logits, random_model, random_windows, their_logits


def exported(tmp_path, per, name="llama", quantise=True, **changes):
    random_model(name, tmp_path / "model", torch.float16, **changes)
    folder, windows = tmp_path / "model", random_windows(12)
    if quantise:
        folder = apply_stage(Gptq(bits=8, group_size=32), folder, tmp_path / "coded", windows)[0].folder
    done, outcome = apply_stage(KvCache(per=per), folder, tmp_path / "stage", windows)
    export(done, tmp_path / "export", "compressed-tensors", torch.float16, 10**9)
    return done, tmp_path / "export", outcome


@pytest.mark.parametrize("per", ["tensor", "head"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_transformers_computes_our_logits_with_rounded_keys_and_values(tmp_path, per, name):
    done, folder, _ = exported(tmp_path, per, name)
    windows = random_windows(2, seed=9)
    section = json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]

    ours, theirs = our_logits(folder, windows), their_logits(load_publicly(folder), windows)

    assert (section["num_bits"], section["type"]) == (8, "float")
    assert section["strategy"] == {"tensor": "tensor", "head": "attn_head"}[per]
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
    unrounded = our_logits(tmp_path / "coded", windows)
    assert (ours - unrounded).abs().max() > 1e-2, "keys and values were not rounded"
    assert Checkpoint(folder).schemes == done.schemes


def test_scales_are_the_largest_key_and_value_that_were_seen(tmp_path):
    done, _, outcome = exported(tmp_path, "head", quantise=False)
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    cache = DynamicCache()
    with torch.no_grad():
        model(random_windows(12).ids, past_key_values=cache, use_cache=True)
    for index, layer in enumerate(cache.layers):
        for leaf, states in (("k_scale", layer.keys), ("v_scale", layer.values)):
            scale = done.read(f"model.layers.{index}.self_attn.{leaf}").float()
            expected = states.abs().amax((0, 2, 3)).view(-1, 1, 1) / LARGEST
            assert scale.shape == (2, 1, 1)
            torch.testing.assert_close(scale, expected, rtol=2e-3, atol=0)
            assert (scale >= expected).all(), "the largest value would be clipped"
    assert [place["block"] for place in outcome.facts["largest"]] == [0, 1]


def test_a_model_without_other_quantisation_gets_a_section_of_its_own(tmp_path):
    _, folder, _ = exported(tmp_path, "tensor", quantise=False)
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    windows = random_windows(2)

    assert section["config_groups"] == {} and section["kv_cache_scheme"]
    torch.testing.assert_close(
        our_logits(folder, windows), their_logits(load_publicly(folder), windows), atol=2e-3, rtol=2e-3
    )


def test_the_example_of_the_docstring():
    scale = scale_of(torch.tensor([3.5]), False, torch.float32)

    assert scale.item() == pytest.approx(0.0078125, rel=1e-6)
    states = torch.tensor([3.5, 0.1, -100.0]).view(1, 1, 3, 1)
    found = rounded(states, torch.tensor([0.0078125])).flatten().tolist()
    assert found == pytest.approx([3.5, 13 * 0.0078125, -3.5])


def test_a_rounded_cache_keeps_shapes_and_dtypes():
    keys = torch.randn(2, 3, 5, 4).half()
    cache = RoundedCache(torch.full((3, 1, 1), 0.01).half(), torch.full((1,), 0.013).half())

    again = cache.update(keys, keys, 0)

    assert all(each.shape == keys.shape and each.dtype == keys.dtype for each in again)
    assert not torch.equal(again[0], again[1])


def test_architectures_whose_attention_runtimes_name_otherwise_are_refused():
    assert "gpt2" in KvCache().check({}, architecture_of(config_of("gpt2")))[0]
    assert KvCache().check({}, architecture_of(config_of("gemma2"))) == []


def test_bytes_that_scales_add_are_predicted(tmp_path):
    from compress.architecture import dimensions_of

    done, _, _ = exported(tmp_path, "head", quantise=False)
    stored = sum(done.tensor_bytes(name) for name in done.kv_scales)

    assert stored == KvCache(per="head").added_bytes(dimensions_of(config_of("llama")), 2)


@pytest.mark.parametrize("stage", [KvCache(per="head"), Vocabulary()], ids=lambda stage: stage.kind)
def test_a_run_killed_between_blocks_ends_with_the_same_bytes(tmp_path, stage):
    random_model("llama", tmp_path / "model", torch.float16)
    whole, outcome = apply_stage(stage, tmp_path / "model", tmp_path / "whole", random_windows(8))

    def stop(index: int) -> None:
        raise KeyboardInterrupt

    solved: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        apply_stage(stage, tmp_path / "model", tmp_path / "killed", random_windows(8), after_block=stop)
    done, again = apply_stage(
        stage, tmp_path / "model", tmp_path / "killed", random_windows(8), after_block=solved.append
    )

    assert solved == [1], "the first block was written before the kill"
    assert done.digest() == whole.digest() and done.schemes == whole.schemes
    assert again.facts == outcome.facts
    assert [record["error"] for record in again.modules] == [record["error"] for record in outcome.modules]
