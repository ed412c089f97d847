"""The registry of formats: layouts an artifact can have. Adding one is one file and one line here.

base                what a format is, and how a folder of safetensors is written
compressed_tensors  packed integers, int8 inputs: the default
gptq                AutoGPTQ's layout
bitsandbytes        NF4, FP4, LLM.int8
gguf                one file for llama.cpp (`gguf_names`, `gguf_rope`, `gguf_tokenizer`: what it is called there)
plain               values written out
layouts             which of them a folder has that is read
support             what each runtime serves of them, with sources: `plan` warns by it, docs/formats.md shows it
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from compress.architecture import Architecture
from compress.checkpoints.formats.base import Format, Shapes, Written
from compress.checkpoints.formats.bitsandbytes import BitsAndBytes
from compress.checkpoints.formats.compressed_tensors import CompressedTensors
from compress.checkpoints.formats.gguf import Gguf
from compress.checkpoints.formats.gptq import GptqLayout
from compress.checkpoints.formats.plain import Plain
from compress.quantization.scheme import Scheme

FormatName = Literal["compressed-tensors", "gptq", "bitsandbytes", "gguf", "plain"]

FORMATS: dict[str, Format] = {
    format_.name: format_ for format_ in (CompressedTensors(), GptqLayout(), BitsAndBytes(), Gguf(), Plain())
}


def able(schemes: Mapping[str, Scheme], shapes: Shapes, architecture: Architecture) -> list[str]:
    """Names of the formats that can hold a model."""
    return [name for name, format_ in FORMATS.items() if not format_.mistakes(schemes, shapes, architecture)]


__all__ = ["FORMATS", "Format", "FormatName", "Written", "able"]
