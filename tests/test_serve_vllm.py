"""scripts/serve_vllm.py with a stand-in for vLLM: what is asked, what is compared, where it is kept."""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import pytest
import torch

from tests.helpers import PROJECT


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("serve_vllm", PROJECT / "scripts" / "serve_vllm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Entry:
    def __init__(self, logprob):
        self.logprob = logprob


class Output:
    def __init__(self, rows):
        self.prompt_logprobs = rows


def standing_in(shift):
    """A vllm whose log-probabilities are transformers', moved by `shift`."""
    module = types.ModuleType("vllm")
    module.__version__ = "0"

    class Llm:
        def __init__(self, folder, **_):
            from transformers import AutoModelForCausalLM

            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

        @torch.no_grad()
        def generate(self, asked, params):
            found = []
            for one in asked:
                ids = torch.tensor([one["prompt_token_ids"]])
                scores = self.model(ids).logits[0, :-1].log_softmax(-1)
                rows = [None]
                for row, token in zip(scores, ids[0, 1:].tolist(), strict=True):
                    best = int(row.argmax())
                    rows.append({best: Entry(float(row[best])), token: Entry(float(row[token]) + shift)})
                found.append(Output(rows))
            return found

    module.LLM, module.SamplingParams = Llm, lambda **given: given
    return module


def test_log_probabilities_are_compared_token_by_token(script, glass, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", standing_in(-0.01))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60, 100))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "stand-in")
    prompts = [prompt[:40] for prompt in script.prompts_of(glass, 3)]

    served, read = script.by_vllm(glass, prompts, 128), script.by_transformers(glass, prompts)
    result = script.compare(served, read)

    assert result["prompts"] == 3 and result["tokens"] == 3 * 39
    assert result["mean_abs_logprob_difference"] == pytest.approx(0.01, rel=0.1)
    assert result["perplexity_ratio"] == pytest.approx(1.01005, rel=1e-3)
    assert result["same_most_likely_token"] > 0.95
    assert served["device_bytes_in_use"] == 40 and served["output_tokens_per_second"] > 0


def test_it_is_kept_beside_the_version_which_never_changes(script, tmp_path):
    (tmp_path / "store" / "name" / "v0003" / "model").mkdir(parents=True)
    artifact = tmp_path / "store" / "name" / "v0003"

    assert script.model_folder(artifact) == artifact / "model"
    assert script.kept_at(artifact) == tmp_path / "store" / "name" / "serving" / "v0003.json"
    assert json.dumps(script.compare({"logprobs": [[0.0]], "best": [[1]]}, {"logprobs": [[-1.0]], "best": [[2]]}))


def test_the_report_says_how_it_was_served(script, tmp_path):
    from compress.artifacts.store import Store
    from compress.errors import CompressError
    from compress.reports.standing import sentences
    from compress.steps.standing import standing_of

    path = script.kept_at(tmp_path / "name" / "v0003")
    path.parent.mkdir(parents=True)
    sides = {"logprobs": [[-1.0, -2.0]], "best": [[1, 2]]}, {"logprobs": [[-1.0, -2.02]], "best": [[1, 3]]}
    beside = {"output_tokens_per_second": 1234.5, "device": "H100", "device_bytes_in_use": 2**31}
    path.write_text(json.dumps({**script.compare(*sides), **beside, "versions": {"vllm": "0.20"}}))

    (sentence,) = sentences(standing_of(Store(tmp_path), "name", "v0003"))

    assert sentence.startswith("Served with vLLM 0.20 on H100: over 1 prompts log-probabilities differ")
    assert "by 0.01 nats a token (0.02 at most)" in sentence and "the same in 50.0 % of places" in sentence
    assert "1,234 tokens a second, 2.0 GiB" in sentence
    assert sentences(standing_of(Store(tmp_path), "name", "v0004")) == []
    path.write_text("{}")
    with pytest.raises(CompressError, match="not what serving was measured as"):
        standing_of(Store(tmp_path), "name", "v0003")


def test_too_short_a_text_is_an_error(script, glass):
    with pytest.raises(SystemExit, match="passages"):
        script.prompts_of(glass, 10**6)
