"""Checkpoints in formats that only their own loader understands, as plain matrices.

GPTQ, AWQ, bitsandbytes and others each pack weights their own way. What all of them agree on is what a linear does: it
multiplies. So the model is loaded through its public loader, and each quantised linear is given the identity matrix;
what comes out is its weight, as the runtime computes with it. That holds where inputs are not quantised, which
`readable_as` checks.
"""

from __future__ import annotations

import json
import shutil
import warnings
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.checkpoints.folder import tokenizer_files
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Skeleton
from compress.errors import EnvironmentLacksError, RecipeError
from compress.events import Progress
from compress.files import write_json

WEIGHTS_ONLY = ("gptq", "awq", "bitsandbytes", "hqq", "auto-round", "compressed-tensors")
"""quant_method of formats that leave activations alone, if their config does not say otherwise."""
COLUMNS_AT_ONCE = 512


def readable_as(checkpoint: Checkpoint) -> Literal["itself", "loaded"]:
    """Whether our reader understands a folder, or its public loader is needed. Raises RecipeError where the weights
    alone are not the model, because activations are quantised too."""
    config = checkpoint.config.get("quantization_config")
    if not config:
        return "itself"
    if checkpoint.is_understood:
        return "itself"
    method = str(config.get("quant_method") or "unknown")
    groups = list((config.get("config_groups") or {}).values())
    quantises_inputs = config.get("load_in_8bit") or any(group.get("input_activations") for group in groups)
    if method not in WEIGHTS_ONLY or quantises_inputs:
        what = "its activations are quantised too" if quantises_inputs else f"quant_method {method!r} is not known here"
        raise RecipeError(
            f"{checkpoint.folder}: {what}, so its weights alone do not tell what it computes. Weight-only formats can "
            f"be judged: {', '.join(WEIGHTS_ONLY)}."
        )
    return "loaded"


@torch.no_grad()
def write_dense(folder: Path, target: Path, progress: Progress) -> None:
    """Write the model in `folder` as plain safetensors, every quantised linear by what it does to the identity.

    The whole model is in memory. Raises EnvironmentLacksError where its loader cannot load it here, and RecipeError for
    a tensor that is neither plain nor a linear's.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Ours to know: this one unpacks lazily, in its first forward.
    model = _load(folder, unpack=config.pop("quantization_config")["quant_method"] == "compressed-tensors")
    skeleton = Skeleton(config, torch.device("cpu"), torch.float32)
    tensors: dict[str, Tensor] = {}
    shapes = skeleton.parameter_shapes()
    with progress.task("reading weights through their loader", len(shapes)) as advance:
        for name, shape in shapes.items():
            tensors[name] = _parameter(model, name, shape, folder)
            advance("")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    write_json(target / "config.json", config)
    for path in tokenizer_files(folder):
        shutil.copy2(path, target / path.name)


def _load(folder: Path, unpack: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
            if unpack:
                device = next(model.parameters()).device
                model(torch.ones(1, 2, dtype=torch.int64, device=device), use_cache=False)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EnvironmentLacksError(f"{folder}: its public loader cannot load it here ({first}).") from error
    return model  # type: ignore[no-any-return]


def _parameter(model: nn.Module, name: str, shape: tuple[int, ...], folder: Path) -> Tensor:
    """One parameter, dense and on the host."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    stored = getattr(module, leaf, None)
    if isinstance(stored, Tensor) and stored.is_floating_point() and tuple(stored.shape) == shape:
        return stored.detach().cpu().contiguous()
    if leaf == "weight" and len(shape) == 2:
        return matrix_of(module, shape).contiguous()
    raise RecipeError(
        f"{folder}: {name} is neither a plain tensor nor the weight of a linear; this format is not known"
    )


@torch.no_grad()
def matrix_of(linear: Any, shape: tuple[int, ...]) -> Tensor:
    """The (outputs, inputs) weight of a linear in any form: what it makes of the identity, without its bias."""
    rows, columns = shape
    tensors = [*linear.parameters(), *linear.buffers()]
    device = tensors[0].device
    dtype = next((t.dtype for t in tensors if t.is_floating_point() and t.dtype != torch.float32), torch.float32)
    bias, parts = getattr(linear, "bias", None), []
    linear.bias = None
    try:
        for start in range(0, columns, COLUMNS_AT_ONCE):
            stop = min(start + COLUMNS_AT_ONCE, columns)
            inputs = torch.zeros(stop - start, columns, dtype=dtype, device=device)
            inputs[torch.arange(stop - start), torch.arange(start, stop)] = 1
            parts.append(linear(inputs).T.cpu())
    finally:
        linear.bias = bias
    matrix = torch.cat(parts, dim=1)
    if tuple(matrix.shape) != (rows, columns):
        raise RecipeError(f"a linear gives {tuple(matrix.shape)} where the model has {shape}")
    return matrix
