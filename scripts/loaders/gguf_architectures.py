"""Every architecture, rope and block type that is written as .gguf, run by llama.cpp and transformers: the same logits?

    make loaders, which runs it after run.py; or: python scripts/loaders/gguf_architectures.py [--out FILE.json]

Random models (256 wide) in 16 bits and as integers. Recorded is the mean KL from transformers', in float32 on the
values that are in the file, to llama.cpp's; and, to know what the number is worth, to transformers' own with the one
thing taken away that is particular to the case: a window, a cap, a rope. Exit 1 where a KL is above what 8-bit inputs
explain, or not a hundred times (for integers: five times) below that of the thing taken away. Of block types the other
number is the KL to the model before it was rounded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".loaders" / "llamacpp" / "bin" / "python"
WINDOWS, TOKENS, VOCABULARY, BLOCKS, OLD_CONTEXT = 4, 96, 512, 4, 32
HEAD = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE, INTEGERS = "16 bits", {"Q8_0": 8, "Q4_0": 4}
MOST = {DENSE: 1e-5, "Q8_0": 5e-3, "Q4_0": 5e-3}
"""Mean KL in nats. Kernels of integers round inputs to 8 bits."""
TYPES: dict[str, dict[str, Any]] = {
    "Q4_0": {"bits": 4, "group_size": 32},
    "Q4_1": {"bits": 4, "group_size": 32, "symmetric": False},
    "Q5_0": {"bits": 5, "group_size": 32},
    "Q5_1": {"bits": 5, "group_size": 32, "symmetric": False},
    "Q8_0": {"bits": 8, "group_size": 32},
    **{f"Q{bits}_K": {"bits": bits, "k_quant": True} for bits in (2, 3, 4, 5, 6)},
}
"""Fields of the stage that makes each block type."""
SLIDE, FULL = "sliding_attention", "full_attention"


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


YARN = _rope("yarn", factor=8.0, original_max_position_embeddings=OLD_CONTEXT)
LINEAR, DEFAULT = _rope("linear", factor=4.0), _rope("default")
LLAMA3 = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=OLD_CONTEXT
)


def _longrope(old: int, columns: int) -> dict[str, Any]:
    short, long = ([1 + step * index for index in range(columns // 2)] for step in (0.05, 0.5))
    return _rope("longrope", short_factor=short, long_factor=long, original_max_position_embeddings=old)


def _without_one(model: nn.Module) -> None:
    """Norms as if 1 had not been added."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.sub_(1)


@dataclass(frozen=True)
class Case:
    """A model and what is taken away from it: values of its config, or something done to the loaded model."""

    name: str
    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    without: Mapping[str, Any] | Callable[[nn.Module], None] = field(default_factory=dict)
    dtype: torch.dtype = torch.float16


_GEMMA: dict[str, Any] = {"head_dim": HEAD, "tie_word_embeddings": True}
_GEMMA_2 = {**_GEMMA, "query_pre_attn_scalar": HEAD, "sliding_window": 24}
_CAPPED = {**_GEMMA_2, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}
_GEMMA_3 = {**_GEMMA_2, "layer_types": [SLIDE, SLIDE, FULL, SLIDE]}
_LOCAL = {FULL: {**DEFAULT, "rope_theta": 1e6}, SLIDE: DEFAULT}
_SCALED = {FULL: {**LINEAR, "rope_theta": 1e6}, SLIDE: DEFAULT}
_PHI: dict[str, Any] = {"sliding_window": None, "original_max_position_embeddings": 512}
_NO_ROPE: dict[str, Any] = {"no_rope_layers": None, "num_hidden_layers": 5, "tie_word_embeddings": True}
_LARGE: dict[str, Any] = {"head_dim": HEAD // 2, "query_pre_attn_scalar": HEAD, "layer_types": None}
"""hidden_size / heads is not head_dim, as in the models of 27B, whose queries llama.cpp scales by the former."""


def _phi(old: int, partial: float) -> dict[str, Any]:
    rope = {**_longrope(old, int(HEAD * partial)), "partial_rotary_factor": partial}
    return {**_PHI, "original_max_position_embeddings": old, "rope_parameters": rope}


CASES = (
    Case("llama", "llama", {}, {"rope_parameters": LINEAR}),
    Case("llama: biases", "llama", {"attention_bias": True, "mlp_bias": True}, {"mlp_bias": False}),
    Case("mistral", "mistral", {"sliding_window": None}, {"rope_parameters": LINEAR}),
    Case("qwen2", "qwen2", {}, {"rope_parameters": LINEAR}),
    Case("qwen3", "qwen3", {"head_dim": HEAD}, {"rope_parameters": LINEAR}),
    Case("smollm3", "smollm3", _NO_ROPE, {"no_rope_layers": [1] * 5}),
    Case("gemma", "gemma", _GEMMA, _without_one),
    Case("gemma in bfloat16", "gemma", _GEMMA, _without_one, torch.bfloat16),
    Case("gemma2: windows", "gemma2", _CAPPED, {"sliding_window": 512}),
    Case("gemma2: cap of attention", "gemma2", _CAPPED, {"attn_logit_softcapping": None}),
    Case("gemma2: cap of logits", "gemma2", _CAPPED, {"final_logit_softcapping": None}),
    Case("gemma2: norms", "gemma2", _CAPPED, _without_one),
    Case(
        "gemma2: other layers slide",
        "gemma2",
        {**_CAPPED, "layer_types": [FULL, FULL, SLIDE, FULL]},
        {"layer_types": [SLIDE, FULL, SLIDE, FULL]},
    ),
    Case("gemma3: windows", "gemma3_text", _GEMMA_3, {"sliding_window": 512}),
    Case("gemma3: norms", "gemma3_text", _GEMMA_3, _without_one),
    Case(
        "gemma3: two bases",
        "gemma3_text",
        {**_GEMMA_3, "rope_parameters": _LOCAL},
        {"rope_parameters": {FULL: _LOCAL[FULL], SLIDE: _LOCAL[FULL]}},
    ),
    Case("gemma3: scaled", "gemma3_text", {**_GEMMA_3, "rope_parameters": _SCALED}, {"rope_parameters": _LOCAL}),
    Case(
        "gemma3: no layer slides",
        "gemma3_text",
        {**_GEMMA_3, "layer_types": [FULL] * BLOCKS},
        {"layer_types": [SLIDE] * BLOCKS},
    ),
    *(
        Case(f"{name}: every layer slides", name, {**more, "layer_types": [SLIDE] * BLOCKS}, {"sliding_window": 512})
        for name, more in (("gemma2", _CAPPED), ("gemma3_text", _GEMMA_3))
    ),
    *(
        Case(
            f"{name}: {blocks} blocks",
            name,
            {**more, **_LARGE, "num_hidden_layers": blocks},
            {"query_pre_attn_scalar": HEAD // 2},
        )
        for name, more, blocks in (("gemma2", _CAPPED, 46), ("gemma3_text", _GEMMA_3, 62))
    ),
    Case(
        "gemma3: own head, cap of logits",
        "gemma3_text",
        {**_GEMMA_3, "tie_word_embeddings": False, "final_logit_softcapping": 4.0},
        {"final_logit_softcapping": None},
    ),
    Case("phi3", "phi3", _PHI, {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}}),
    Case(
        "phi3: half of a head",
        "phi3",
        {**_PHI, "rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}},
        {"rope_parameters": DEFAULT},
    ),
    Case("phi3: longrope, short", "phi3", _phi(256, 1.0), {"rope_parameters": DEFAULT}),
    Case(
        "phi3: longrope, long",
        "phi3",
        {**_phi(OLD_CONTEXT, 0.75), "tie_word_embeddings": True},
        {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.75}},
    ),
    Case("llama: llama3", "llama", {"rope_parameters": LLAMA3}, {"rope_parameters": DEFAULT}),
    Case(
        "llama: longrope, long",
        "llama",
        {"rope_parameters": _longrope(OLD_CONTEXT, HEAD)},
        {"rope_parameters": DEFAULT},
    ),
    *(
        Case(f"{name}: {kind}", name, {**more, "rope_parameters": rope}, {"rope_parameters": DEFAULT})
        for name, more in (
            *(("llama", {}), ("qwen2", {}), ("qwen3", {"head_dim": HEAD})),
            *(("smollm3", _NO_ROPE), ("gemma", _GEMMA), ("gemma2", _CAPPED)),
        )
        for kind, rope in (("linear", LINEAR), ("yarn", YARN))
    ),
    Case(
        "llama: yarn, own attention factor",
        "llama",
        {"rope_parameters": {**YARN, "attention_factor": 1.7}},
        {"rope_parameters": YARN},
    ),
    Case(
        "llama: yarn, mscale",
        "llama",
        {"rope_parameters": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}},
        {"rope_parameters": YARN},
    ),
)


def random_model(case: Case, folder: Path) -> None:
    """A model whose logits depend on every weight, saved in the case's dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.model_type, **{**SIZES, **case.changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_((parameter.mean() if parameter.dim() == 1 else 0) + scale * noise)
    model.to(case.dtype).save_pretrained(folder)


@torch.no_grad()
def logits_of(folder: Path, ids: Tensor, without: Mapping[str, Any] | Callable[[nn.Module], None]) -> Tensor:
    """transformers' logits float32 (windows, tokens, vocabulary), with something taken away."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    changes = without if isinstance(without, Mapping) else {}
    model_type = config.pop("model_type")
    changed = AutoConfig.for_model(model_type, **{**config, **changes})
    model = AutoModelForCausalLM.from_pretrained(folder, config=changed, dtype=torch.float32).eval()
    if callable(without):
        without(model)
    logits: Tensor = model(ids, use_cache=False).logits
    return logits


def theirs(path: Path, ids: Tensor, scratch: Path) -> Tensor:
    """llama.cpp's logits float32 (windows, tokens, vocabulary)."""
    asked, out = scratch / "asked.safetensors", scratch / "out.safetensors"
    save_file({"input_ids": ids, "prompt": ids[0, :8].clone()}, asked)
    worker = Path(__file__).with_name("llamacpp_worker.py")
    done = subprocess.run([PYTHON, worker, path, asked, out], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{path}: llama.cpp ended with {done.returncode}: {done.stderr[-2000:]}")
    logits: Tensor = load_file(out)["llama.cpp"]
    return logits


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean KL in nats."""
    log_p, log_q = expected.log_softmax(-1), found.float().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def judge(case: Case, ids: Tensor, place: Path) -> dict[str, Any]:
    """Mean KL to llama.cpp, and to transformers without the thing, for each kind of file."""
    from compress.checkpoints.export import export
    from compress.checkpoints.formats import FORMATS
    from compress.checkpoints.reader import Checkpoint

    random_model(case, place / "model")
    source = Checkpoint(place / "model")
    if refused := FORMATS["gguf"].refuses_config(source.config):
        raise SystemExit(f"{case.name}: {refused}")
    row: dict[str, Any] = {"case": case.name}
    for kind in (DENSE, *INTEGERS):
        made, folder = source, place / kind.replace(" ", "")
        if kind != DENSE:
            made = rounded(source, folder / "stage", case.dtype, {"bits": INTEGERS[kind], "group_size": 32})
        for format_ in ("gguf", "plain"):
            export(made, folder / format_, format_, case.dtype, 10**9)
        expected = logits_of(folder / "plain", ids, {})
        found = theirs(folder / "gguf" / "model.gguf", ids, folder)
        row[kind] = divergence(expected, found)
        row[f"{kind}, without"] = divergence(expected, logits_of(folder / "plain", ids, case.without))
    return row


def rounded(source: Any, folder: Path, dtype: torch.dtype, fields: Mapping[str, Any]) -> Any:
    """The checkpoint that round_to_nearest makes of one, with these fields."""
    from compress.checkpoints.reader import Checkpoint
    from compress.checkpoints.working import WorkingCheckpoint
    from compress.events import Quiet
    from compress.stages import RoundToNearest, StageContext

    output = WorkingCheckpoint(folder)
    context = StageContext(
        origin=source,
        source=source,
        output=output,
        windows=None,
        device=torch.device("cpu"),
        compute=torch.float32,
        stored=dtype,
        tokens_at_once=TOKENS,
        seed=0,
        progress=Quiet(),
        after_block=lambda index: None,
    )
    RoundToNearest(**fields).apply(context)
    output.finish({"done": True})
    return Checkpoint(folder)


def judge_type(kind: str, ids: Tensor, place: Path) -> dict[str, Any]:
    """Mean KL to llama.cpp of a random Llama in one block type, and to itself before it was rounded."""
    from compress.checkpoints.export import export
    from compress.checkpoints.reader import Checkpoint

    # Super-blocks are 256 columns wide.
    case = Case("types", "llama", {"intermediate_size": 512}, {})
    random_model(case, place / "model")
    made = rounded(Checkpoint(place / "model"), place / "stage", case.dtype, TYPES[kind])
    for format_ in ("gguf", "plain"):
        export(made, place / format_, format_, case.dtype, 10**9)
    expected = logits_of(place / "plain", ids, {})
    found = divergence(expected, theirs(place / "gguf" / "model.gguf", ids, place))
    return {"type": kind, "kl": found, "unrounded": divergence(expected, logits_of(place / "model", ids, {}))}


def type_passed(row: Mapping[str, Any]) -> bool:
    return row["kl"] < 1.5e-3


def passed(row: Mapping[str, Any]) -> bool:
    times = {DENSE: 100, **dict.fromkeys(INTEGERS, 5)}
    return all(row[kind] < MOST[kind] and times[kind] * row[kind] < row[f"{kind}, without"] for kind in times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "architectures.json")
    parser.add_argument("--only", help="a part of the names of cases")
    arguments = parser.parse_args()
    ids = torch.randint(3, VOCABULARY, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(1))
    types = []
    for kind in TYPES:
        if arguments.only is None or arguments.only in kind:
            with tempfile.TemporaryDirectory() as scratch:
                types.append(judge_type(kind, ids, Path(scratch)))
            print(json.dumps({**types[-1], "passed": type_passed(types[-1])}), flush=True)
    rows = []
    for case in CASES:
        if arguments.only is None or arguments.only in case.name:
            with tempfile.TemporaryDirectory() as scratch:
                rows.append(judge(case, ids, Path(scratch)))
            print(json.dumps({**rows[-1], "passed": passed(rows[-1])}), flush=True)
    code = "from importlib.metadata import version; print(version('llama-cpp-python'))"
    there = subprocess.run([PYTHON, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    versions = {
        "llama-cpp-python": there,
        **{name: metadata.version(name) for name in ("transformers", "torch", "gguf")},
    }
    machine = {"platform": platform.platform(), "cores": os.cpu_count()}
    result = {
        "windows": WINDOWS,
        "tokens": TOKENS,
        "versions": versions,
        "machine": machine,
        "results": rows,
        "types": types,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(not (all(map(passed, rows)) and all(map(type_passed, types))))


if __name__ == "__main__":
    sys.exit(main())
