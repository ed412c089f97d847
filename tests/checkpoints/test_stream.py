"""The streaming writer, read back by the safetensors library."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from compress.checkpoints.stream import DTYPE_NAMES, Entry, write_safetensors, write_sharded


def entry(name: str, tensor: torch.Tensor) -> Entry:
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_safetensors_reads_every_dtype_back(tmp_path, dtype):
    tensor = (torch.arange(21).view(3, 7) % 2).to(dtype)

    write_safetensors(tmp_path / "a.safetensors", [entry("t", tensor)])

    read = load_file(tmp_path / "a.safetensors")["t"]
    assert read.dtype == dtype and torch.equal(read, tensor)


def test_odd_shapes_views_and_single_elements_are_written_in_order(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    tensors = {
        "transposed": base.T,
        "strided": base[:, ::2],
        "one_element_of_a_wide_row": base[:1, :1].T,
        "one_element_with_a_stride": torch.arange(12.0).view(6, 2).T[:1, ::6],
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 5),
    }

    write_safetensors(tmp_path / "a.safetensors", [entry(name, tensor) for name, tensor in tensors.items()])

    read = load_file(tmp_path / "a.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor), name


def test_shards_and_their_index_hold_every_tensor_once(tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(10)}

    total = write_sharded(tmp_path, [entry(name, tensor) for name, tensor in tensors.items()], max_shard_bytes=1000)

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert total == index["metadata"]["total_size"] == 4000
    assert set(index["weight_map"]) == set(tensors)
    assert len(set(index["weight_map"].values())) == 5
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_a_tensor_that_is_not_what_was_promised_leaves_no_file(tmp_path):
    wrong = Entry("t", torch.float32, (3,), lambda: torch.zeros(4))

    with pytest.raises(AssertionError, match="promised shape"):
        write_safetensors(tmp_path / "a.safetensors", [wrong])

    assert list(tmp_path.iterdir()) == []


def test_a_file_says_it_is_for_torch(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", [entry("t", torch.zeros(1))], {"more": "notes"})

    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "more": "notes"}
