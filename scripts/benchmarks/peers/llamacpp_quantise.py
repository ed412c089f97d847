"""A .gguf file in 16 bits, quantised by llama.cpp itself, through llama-cpp-python.

    python llamacpp_quantise.py FILE.gguf OUT.gguf FTYPE [IMATRIX.safetensors]

FTYPE is a name of llama.cpp's without its prefix: Q4_K_M, Q3_K_M, Q2_K. IMATRIX has, for each tensor's name in the
file, the mean square of each input column (columns,) float32, as llama-imatrix collects them.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp
from safetensors.numpy import load_file


def main(path: str, out: str, ftype: str, imatrix: str | None = None) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    kept = []
    if imatrix:
        columns = {name: values.astype("float32") for name, values in load_file(imatrix).items()}
        entries = (llama_cpp.llama_model_imatrix_data * (len(columns) + 1))()
        for entry, (name, values) in zip(entries, sorted(columns.items()), strict=False):
            entry.name = name.encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
            kept.append(values)
        parameters.imatrix = entries
    if llama_cpp.llama_model_quantize(path.encode(), out.encode(), ctypes.byref(parameters)):
        raise SystemExit("llama.cpp did not quantise the file")


if __name__ == "__main__":
    main(*sys.argv[1:])
