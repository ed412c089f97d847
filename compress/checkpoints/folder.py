"""The files of a model folder: its config, its weights, and what travels with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compress.errors import CompressError, RecipeError, UnhealthySourceError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class DamagedCheckpointError(CompressError):
    """A model folder that cannot be read: truncated, missing tensors, not safetensors."""

    exit_code = UnhealthySourceError.exit_code


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, parsed. Raises RecipeError where there is none, DamagedCheckpointError where it is no object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{folder}: no config.json here, so this is not a Hugging Face model folder.") from None
    except (ValueError, OSError) as error:
        raise DamagedCheckpointError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(config, dict):
        raise DamagedCheckpointError(f"{path}: expected a JSON object.")
    return config


def weight_files(folder: Path) -> Iterable[Path]:
    """The safetensors files of a model. Raises RecipeError where there are none, DamagedCheckpointError where an index
    is broken."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise DamagedCheckpointError(f"{index}: not an index of weight files ({error}); fetch it again.") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise DamagedCheckpointError(f"{folder}: the index names files that are not there: {', '.join(missing)}.")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise RecipeError(
            f"{folder}: the weights are pickles ({', '.join(pickles[:3])}), which can run code when loaded and are "
            "never read here. Convert them to safetensors where you trust the file: load with transformers, then "
            "save_pretrained(...)."
        )
    raise RecipeError(f"{folder}: no .safetensors files here.")


def says_tied(config: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json, or what its model class says where it does not, ties the head to the embedding."""
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    from transformers import AutoConfig

    return bool(AutoConfig.for_model(config["model_type"]).tie_word_embeddings)


def companion_files(folder: Path) -> list[Path]:
    """Config, tokenizer and template files that travel with a model."""
    names = (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "source.json",
    )
    return [folder / name for name in names if (folder / name).is_file()]


def tokenizer_files(folder: Path) -> list[Path]:
    """The companions without the model config and our own notes."""
    return [path for path in companion_files(folder) if path.name not in ("config.json", "source.json")]
