"""Which of the packed layouts a checkpoint has, if it is one that is read here; see `reader.Layout`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.checkpoints.reader import Layout


def layout_of(config: Mapping[str, Any], names: Sequence[str]) -> Layout | None:
    """The reader of a `quantization_config`, by its method; None where only its own loader understands it."""
    from compress.checkpoints.formats import bitsandbytes, compressed_tensors, gptq

    readers: dict[str, Any] = {
        "compressed-tensors": compressed_tensors,
        "gptq": gptq,
        "bitsandbytes": bitsandbytes,
    }
    reader = readers.get(str(config.get("quant_method")))
    return reader if reader is not None and reader.understood(config, names) else None
