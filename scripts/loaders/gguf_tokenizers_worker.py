"""Token ids of texts by the vocabulary of .gguf files, as llama.cpp reads them: JSON on stdin and on stdout.

python gguf_tokenizers_worker.py < ASKED.json      {"files": {name: path}, "texts": [...]} -> {name: [ids of each text]}
"""

from __future__ import annotations

import json
import sys

from llama_cpp import Llama


def main() -> None:
    asked = json.load(sys.stdin)
    found = {}
    for name, path in asked["files"].items():
        model = Llama(path, vocab_only=True, verbose=False)
        found[name] = [model.tokenize(text.encode(), add_bos=False, special=False) for text in asked["texts"]]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
