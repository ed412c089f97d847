"""Anonymous host memory does not grow with the number of blocks: only one is resident at a time."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers import run_cli

MIB = 2**20
BLOCK_BYTES = (2 * 512 * 512 + 2 * 256 * 512 + 3 * 512 * 1408) * 4
"""Of one block in float32, which is what the walk computes in: 11 MiB. Twenty-four of them would be 270 MiB."""


def test_peak_anonymous_memory_is_the_same_for_8_and_32_blocks(recipe, glass, glass_recipe, tmp_path):
    """Peaks of one depth differ by up to two blocks between runs, as the heap happens to lie and the sampler to look:
    what is too much is measured once more at both depths, and the smaller peaks count. Growth would be there twice."""
    peaks = {}

    def measured(blocks):
        model = _random_llama(tmp_path / f"model-{blocks}", blocks, glass)
        path = recipe(
            model={"path": str(model), "max_perplexity": 1e6},
            calibration={**glass_recipe["calibration"], "windows": 8, "window_tokens": 64},
            evaluation=[{**glass_recipe["evaluation"][1], "windows": 2, "window_tokens": 64}],
            stages=[{"kind": "gptq", "group_size": 64, "scales": "minmax"}],
            gates=[{"kind": "events", "event": "rounding_fallback"}],
        )
        cache = tmp_path / f"cache-{blocks}"
        ended = run_cli("run", path, "--store", tmp_path / "store", "--json", env={"COMPRESS_CACHE": str(cache)})
        assert ended.code == 0, ended.err
        shutil.rmtree(model)
        shutil.rmtree(cache)
        return _by_phase(json.loads(ended.out))

    def grown():
        return [
            phase
            for phase in ("between phases", "source", "baseline", "stage 0: gptq", "export", "evaluation")
            if peaks[32][phase] > peaks[8][phase] + 2 * BLOCK_BYTES
        ]

    for blocks in (8, 32):
        peaks[blocks] = measured(blocks)
    if grown():
        for blocks in (8, 32):
            again = measured(blocks)
            peaks[blocks] = {phase: min(peak, again[phase]) for phase, peak in peaks[blocks].items() if phase in again}
    print(peaks)
    assert not grown(), peaks


def _by_phase(report: dict) -> dict[str, int]:
    """Bytes by phase, from the sentence in the report: 'by phase: source 300 MiB, stage 0: gptq 320 MiB'."""
    note = report["memory"]["peak_host"]["note"]
    return {name: int(mib) * MIB for name, mib in re.findall(r"(?:^by phase: |, )(.+?) (\d+) MiB", note)}


def _random_llama(folder: Path, blocks: int, glass: Path) -> Path:
    """A Llama of the given depth whose tokenizer is glass's."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(glass / name, folder / name)
    return folder
