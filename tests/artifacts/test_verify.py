"""`verify` names every damage that a disk, a copy or a person can do to an artifact."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from compress.artifacts import verify_safetensors as module
from compress.artifacts.verify import verify
from compress.artifacts.verify_safetensors import BrokenSafetensors, non_finite_counts, read_header

from .conftest import overwrite, shard

Publish = Callable[..., Path]
WEIGHTS = "model/model.safetensors"


def problems_of(path: Path) -> str:
    return "\n".join(verify(path).problems)


def test_an_untouched_artifact_has_no_problems_and_is_counted(publish: Publish) -> None:
    result = verify(publish())
    assert result.problems == ()
    assert (result.ok, result.files, result.tensors) == (True, 6, 2)
    assert result.bytes > 8 * 4 * 4


def test_a_flipped_bit_in_any_file_is_named(publish: Publish) -> None:
    path = publish()
    for file in ["model/README.md", "model/config.json", WEIGHTS, "recipe.yaml", "reports/report.json"]:
        content = (path / file).read_bytes()
        overwrite(path / file, content[:-1] + bytes([content[-1] ^ 1]))
        assert f"{file}: its bytes have changed" in problems_of(path)
        overwrite(path / file, content)
    assert verify(path).ok


def test_a_flipped_bit_anywhere_in_the_manifest_is_noticed(publish: Publish) -> None:
    path = publish()
    content = (path / "manifest.json").read_bytes()
    for position in range(0, len(content), 13):
        if content[position : position + 1].isspace():
            continue
        changed = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        overwrite(path / "manifest.json", changed)
        assert not verify(path).ok, changed[max(0, position - 20) : position + 20]


def test_an_edited_verdict_is_noticed(publish: Publish) -> None:
    path = publish(verdict="failed")
    content = (path / "manifest.json").read_bytes()
    overwrite(path / "manifest.json", content.replace(b'"failed"', b'"passed"'))
    assert "has been edited" in problems_of(path)
    assert "does not belong under r0001" in problems_of(path)


def test_a_renumbered_version_is_noticed(publish: Publish) -> None:
    path = publish()
    assert "says v0001, but the folder is v0007" in problems_of(path.rename(path.parent / "v0007"))


def test_missing_and_extra_files_are_named(publish: Publish) -> None:
    path = publish()
    (path / "recipe.yaml").unlink()
    (path / "model" / "notes.txt").write_text("")
    assert "recipe.yaml: in the manifest, but missing" in problems_of(path)
    assert "model/notes.txt: not in the manifest" in problems_of(path)


def test_a_missing_manifest_or_folder_is_a_problem_not_a_crash(publish: Publish, tmp_path: Path) -> None:
    path = publish()
    (path / "manifest.json").unlink()
    assert "manifest.json: no such file" in problems_of(path)
    assert "no such folder" in problems_of(tmp_path / "nowhere")


def test_links_are_refused(publish: Publish, tmp_path: Path) -> None:
    path = publish()
    (path / "recipe.yaml").rename(tmp_path / "moved")
    (path / "recipe.yaml").symlink_to(tmp_path / "moved")
    (path / "reports" / "out").symlink_to("/etc")
    assert "recipe.yaml: a link or special file" in problems_of(path)
    assert "reports/out: a link or special file" in problems_of(path)


def test_pickles_are_named(publish: Publish) -> None:
    path = publish(prepare=lambda folder: (folder / "model" / "pytorch_model.bin").write_bytes(b"x"))
    assert "model/pytorch_model.bin: a pickle can run code" in problems_of(path)


# --- weights --------------------------------------------------------------------------------------------------------


def test_a_published_nan_is_named_with_its_tensor(publish: Publish) -> None:
    weights = np.ones((3, 5), np.float32)
    weights[1, 2], weights[2, 4] = np.nan, -np.inf
    path = publish(prepare=lambda folder: save_file({"good": np.ones(2, np.float32), "bad": weights}, folder / WEIGHTS))
    assert verify(path).problems == (f"{WEIGHTS}: bad: 2 values are NaN or infinite",)


def test_truncated_weights_are_named(publish: Publish) -> None:
    def cut(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[:-3])

    assert f"{WEIGHTS}: truncated: the header promises" in problems_of(publish(prepare=cut))


def test_a_model_folder_without_weights_is_a_problem(publish: Publish) -> None:
    path = publish(prepare=lambda folder: (folder / WEIGHTS).unlink())
    assert "holds no safetensors file" in problems_of(path)


def test_shards_that_fit_their_index_pass(publish: Publish) -> None:
    assert verify(publish(prepare=shard)).problems == ()


def test_missing_extra_and_misplaced_tensors_are_named(publish: Publish) -> None:
    def damage(folder: Path) -> None:
        shard(folder)
        save_file({"c": np.ones(1, np.float32)}, folder / "model" / "model-00002-of-00002.safetensors")
        index = folder / "model" / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["d"] = "model-00003-of-00003.safetensors"
        index.write_text(json.dumps(content))

    found = problems_of(publish(prepare=damage))
    assert "b should be in model-00002-of-00002.safetensors, but is missing there" in found
    assert "model/model-00002-of-00002.safetensors: c is extra" in found
    assert "names model-00003-of-00003.safetensors, which is missing" in found


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(publish: Publish, text: str) -> None:
    def damage(folder: Path) -> None:
        shard(folder)
        (folder / "model" / "model.safetensors.index.json").write_text(text)

    assert "index.json: not JSON with a weight_map" in problems_of(publish(prepare=damage))


def test_shards_need_an_index(publish: Publish) -> None:
    def damage(folder: Path) -> None:
        shard(folder)
        (folder / "model" / "model.safetensors.index.json").unlink()

    assert "but no model.safetensors.index.json" in problems_of(publish(prepare=damage))


def test_every_bit_pattern_is_judged_as_torch_judges_it(tmp_path: Path) -> None:
    """All 65,536 patterns of the 16-bit dtypes, and all 256 of float8, against torch.isfinite."""
    import torch
    from safetensors.torch import save_file as save_torch

    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    bytes_ = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    tensors = {
        "bf16": halves.view(torch.bfloat16).clone(),
        "f16": halves.view(torch.float16),
        "e4m3": bytes_.view(torch.float8_e4m3fn).clone(),
        "e5m2": bytes_.view(torch.float8_e5m2),
        "f64": torch.tensor([1.0, float("nan"), float("inf"), 1.7e308], dtype=torch.float64),
        "integers": halves.clone(),
    }
    save_torch(tensors, tmp_path / "all.safetensors")
    expected = {name: int((~torch.isfinite(tensor.to(torch.float64))).sum()) for name, tensor in tensors.items()}
    counts = non_finite_counts(tmp_path / "all.safetensors", read_header(tmp_path / "all.safetensors"))
    assert counts == {name: count for name, count in expected.items() if count}


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 1 << 16)
    path = tmp_path / "big.safetensors"
    weights = np.ones(4 << 20, np.float32)
    weights[-1] = np.nan
    save_file({"big": weights}, path)
    header = read_header(path)
    del weights
    tracemalloc.start()
    assert non_finite_counts(path, header) == {"big": 1}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20, "a tensor of 16 MiB was held whole"


def _file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _tensor(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "truncated: 0 bytes"),
        (b"\xff" * 8, "not a safetensors file"),
        ((50).to_bytes(8, "little") + b"{}", "truncated: the header alone"),
        (_file(b"{"), "not JSON"),
        (_file([]), "not a JSON object"),
        (_file({"a": 3}), "a: the header says 3"),
        (_file({"a": _tensor("F32", [2], 0, 4)}, bytes(4)), "does not take 4 bytes"),
        (_file({"a": _tensor("F32", [-1], 0, 4)}, bytes(4)), "not sizes"),
        (_file({"a": _tensor("X9", [1], 0, 4)}, bytes(4)), "dtype X9 is not known"),
        (_file({"a": _tensor("U8", [2], 0, 2), "b": _tensor("U8", [2], 1, 3)}, bytes(3)), "overlap"),
        (_file({"a": _tensor("U8", [2], 1, 3)}, bytes(3)), "a gap before a"),
        (_file({"a": _tensor("U8", [2], 0, 2)}, bytes(5)), "3 bytes after the last tensor"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(BrokenSafetensors, match=says):
        read_header(tmp_path / "x.safetensors")
