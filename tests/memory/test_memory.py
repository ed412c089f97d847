"""Measured memory is this process's anonymous memory, by phase; predicted bytes are sums anybody can redo."""

from __future__ import annotations

import mmap
import time

import pytest
import torch

from compress.architecture import Dimensions
from compress.checkpoints.formats import FORMATS
from compress.memory.measure import PeakSampler, available_bytes, release, rss_anon
from compress.memory.predict import (
    calibration_device_bytes,
    effective_bits,
    kv_cache_bytes,
    stored_bytes,
)
from compress.quantization.scheme import Scheme
from tests.tiny import load_of_8b

MIB = 2**20


def test_memory_that_is_touched_counts_and_is_given_back():
    release()
    before = rss_anon()
    block = torch.ones(64 * MIB, dtype=torch.uint8)

    assert 60 * MIB < rss_anon() - before < 80 * MIB
    del block
    release()
    assert rss_anon() - before < 10 * MIB


def test_a_file_that_is_mapped_does_not_count(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(bytes(64 * MIB))
    release()
    before = rss_anon()

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        assert rss_anon() - before < 10 * MIB


def test_a_container_limit_counts_where_it_is_lower_and_files_in_cache_can_be_dropped(tmp_path):
    def available(limit):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{90 * MIB}\n")
        (tmp_path / "memory.stat").write_text(f"anon {60 * MIB}\nfile {30 * MIB}\ninactive_file {20 * MIB}\n")
        return available_bytes(tmp_path)

    assert available(100 * MIB) == 30 * MIB
    assert available(10 * MIB) == 0
    assert available("max") > 100 * MIB
    assert available_bytes(tmp_path / "missing") > 100 * MIB


def test_the_sampler_keeps_the_peak_of_each_phase():
    with PeakSampler(interval=0.005) as sampler:
        with sampler.phase("small"):
            time.sleep(0.05)
        with sampler.phase("large"):
            block = torch.ones(64 * MIB, dtype=torch.uint8)
            time.sleep(0.05)
            del block
        with sampler.phase("after"):
            time.sleep(0.05)

    assert sampler.peaks["large"] - sampler.peaks["small"] > 55 * MIB
    assert sampler.peaks["after"] - sampler.peaks["small"] < 15 * MIB
    assert sampler.peak == max(sampler.peaks.values())


def test_the_kv_cache_is_two_tensors_per_block_and_a_sliding_block_keeps_its_window():
    full = Dimensions(2, 64, 4, 2, 16, 256, 100, 0, None, 0)
    mixed = Dimensions(2, 64, 4, 2, 16, 256, 100, 0, 8, 1)

    assert kv_cache_bytes(full, context=100, concurrency=3, dtype_bytes=2) == 2 * 2 * 100 * 2 * 16 * 3 * 2
    assert kv_cache_bytes(mixed, 100, 1, 2) == 2 * (100 + 8) * 2 * 16 * 2
    assert kv_cache_bytes(mixed, 4, 1, 2) == kv_cache_bytes(full, 4, 1, 2)


def test_stored_bytes_are_packed_codes_scales_and_everything_else_in_sixteen_bits():
    shapes = {"a.weight": (64, 128), "a.bias": (64,), "norm.weight": (128,)}
    matrices, schemes = {"a": (64, 128)}, {"a": Scheme(4, True, 64)}

    packed = 64 * 128 // 2 + 64 * 2 * 2 + 16
    assert stored_bytes(shapes, matrices, schemes, 2, FORMATS["compressed-tensors"]) == packed + 2 * (64 + 128)
    assert stored_bytes(shapes, matrices, schemes, 2, FORMATS["plain"]) == 2 * (64 * 128 + 64 + 128)
    assert effective_bits(matrices, schemes, 2, FORMATS["compressed-tensors"]) == 8 * packed / (64 * 128)
    assert effective_bits(matrices, {}, 2, FORMATS["plain"]) is None


@pytest.mark.parametrize(("low_memory", "measured"), [(False, 31_319 * MIB), (True, 11_606 * MIB)])
def test_peaks_of_a_gpu_are_predicted_as_they_were_measured(low_memory, measured):
    """docs/benchmarks/gpu.md has both."""
    assert calibration_device_bytes(load_of_8b(1.5, low_memory), 16384) == pytest.approx(measured, rel=0.1)
