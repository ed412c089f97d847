"""Logits and greedy text of a .gguf file by llama.cpp, through llama-cpp-python.

    python llamacpp_worker.py FILE.gguf WINDOWS.safetensors OUT.safetensors  (in an environment with llama-cpp-python)

WINDOWS has `input_ids` (windows, tokens) and `prompt` (tokens,). OUT gets the logits, and `greedy`: the ids that follow
the prompt. Also printed: the ids of a text as llama.cpp's tokenizer reads it, as JSON on stdout.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from llama_cpp import Llama
from safetensors.numpy import load_file, save_file

GREEDY = 32
TEXT = "In 1851, Melville's whale cost $3.50; it's 12345 words -- \u00e9l\u00e8ve, na\u00efve.\n\n  Two  spaces."


def main(path: str, windows: str, out: str) -> None:
    given = load_file(windows)
    ids, prompt = given["input_ids"], given["prompt"].tolist()
    # An 8-bit KV cache or a smaller batch would compute something else; this is the plain arithmetic.
    model = Llama(path, n_ctx=ids.shape[1] + GREEDY, n_batch=ids.shape[1], logits_all=True, verbose=False, n_threads=2)
    logits = []
    for row in ids:
        model.reset()
        model.eval(row.tolist())
        logits.append(np.array(model.scores[: len(row)], dtype=np.float32))
    model.reset()
    model.eval(prompt)
    greedy = []
    for _ in range(GREEDY):
        greedy.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(greedy[-1:])
    save_file({"llama.cpp": np.stack(logits), "greedy": np.array(greedy)}, out)
    # llama.cpp aborts where it is asked to tokenise for a file without a tokenizer.
    known = model.metadata.get("tokenizer.ggml.model") != "no_vocab"
    tokens = model.tokenize(TEXT.encode(), add_bos=False, special=False) if known else []
    print(json.dumps({"text": TEXT, "tokens": tokens, "metadata": dict(model.metadata)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
