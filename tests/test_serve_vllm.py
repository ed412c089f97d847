"""scripts/serve_vllm.py with a stand-in for vLLM: what is asked, what is compared, where it is kept."""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import psutil
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
        def __init__(self, folder, **settings):
            module.settings = settings
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
    on_cpu(script, monkeypatch)
    prompts = script.prompts_of(glass, 3, tokens=40)

    served, read = script.by_vllm(glass, prompts, 128), script.by_transformers(glass, prompts, "float32")
    result = script.compare(served, read)

    assert result["prompts"] == 3 and result["tokens"] == 3 * 39
    assert result["mean_abs_logprob_difference"] == pytest.approx(0.01, rel=0.1)
    assert result["perplexity_ratio"] == pytest.approx(1.01005, rel=1e-3)
    assert result["same_most_likely_token"] > 0.95
    assert served["output_tokens_per_second"] > 0


def on_cpu(script, monkeypatch):
    """No GPU is there; what is set for vLLM's CPU build is unset again after the test."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in script.ON_CPU.items():
        monkeypatch.setenv(name, value)


def test_without_a_gpu_memory_is_the_peak_of_the_process_and_is_called_so(script, glass, monkeypatch):
    stand_in = standing_in(0.0)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    on_cpu(script, monkeypatch)

    served = script.by_vllm(glass, script.prompts_of(glass, 1, tokens=16), 128, "float32", generated=2)

    assert "device_bytes_in_use" not in served and served["device"].startswith("CPU ")
    assert 2**26 < served["peak_resident_bytes"] < psutil.virtual_memory().total
    assert stand_in.settings["dtype"] == "float32"
    assert stand_in.settings["enforce_eager"] and stand_in.settings["kv_cache_memory_bytes"] == 2**30


def test_on_a_gpu_memory_is_what_is_in_use_there(script, glass, monkeypatch):
    stand_in = standing_in(0.0)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60, 100))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")

    served = script.by_vllm(glass, script.prompts_of(glass, 1, tokens=16), 128)

    assert (served["device"], served["device_bytes_in_use"]) == ("a card", 40)
    assert "peak_resident_bytes" not in served and "enforce_eager" not in stand_in.settings


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
    assert sentence.endswith("1,234 tokens a second, 2.0 GiB of device memory.")
    del beside["device_bytes_in_use"]
    beside["peak_resident_bytes"] = 3 * 2**30
    path.write_text(json.dumps({**script.compare(*sides), **beside, "versions": {"vllm": "0.32"}}))
    (sentence,) = sentences(standing_of(Store(tmp_path), "name", "v0003"))
    assert sentence.endswith("1,234 tokens a second, 3.0 GiB of resident memory at the process's peak.")
    assert sentences(standing_of(Store(tmp_path), "name", "v0004")) == []
    path.write_text("{}")
    with pytest.raises(CompressError, match="not what serving was measured as"):
        standing_of(Store(tmp_path), "name", "v0003")


def test_too_short_a_text_is_an_error(script, glass):
    with pytest.raises(SystemExit, match="passages"):
        script.prompts_of(glass, 10**6)


@pytest.mark.parametrize(
    ("here", "code", "said"), [(False, 7, "vLLM is not installed here"), (True, 2, 'There is no "nope" in the store')]
)
def test_what_is_missing_is_said_without_a_traceback(script, tmp_path, monkeypatch, capsys, here, code, said):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: object() if here else None)
    monkeypatch.setattr(sys, "argv", ["serve_vllm.py", "nope", "--store", str(tmp_path)])

    try:
        ended = script.main()
    except SystemExit as error:
        ended = error.code

    assert ended == code and said in capsys.readouterr().err
