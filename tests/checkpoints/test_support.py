"""The table of what runtimes serve: what vLLM 0.32 was seen to take and to refuse (docs/benchmarks/serving.md)."""

from __future__ import annotations

import pytest

from compress.checkpoints.formats.support import limits_of, unserved
from compress.quantization.scheme import Scheme

INT4, INT8, W8A8 = Scheme(4, True, 64), Scheme(8, True, 64), Scheme(8, True, None, inputs=8)
NF4 = Scheme(4, True, 64, grid="nf4")


def said(runtime, format_name, scheme, shape=(576, 1536)):
    return unserved(runtime, format_name, {"linear": scheme}, {"linear": shape})


@pytest.mark.parametrize(
    ("format_name", "scheme"),
    [
        ("compressed-tensors", INT4),
        ("compressed-tensors", Scheme(4, False, 64)),
        ("compressed-tensors", Scheme(4, True, None)),
        ("compressed-tensors", W8A8),
        ("gptq", INT4),
        ("plain", INT8),
    ],
)
def test_what_was_served_on_a_cpu_is_said_to_be(format_name, scheme):
    assert said("vLLM on a CPU", format_name, scheme) == []


@pytest.mark.parametrize(
    ("format_name", "scheme"),
    [
        ("compressed-tensors", INT8),
        ("compressed-tensors", Scheme(3, True, 64)),
        ("gptq", INT8),
        ("gptq", Scheme(4, False, 64)),
        ("bitsandbytes", NF4),
    ],
)
def test_what_was_refused_on_a_cpu_is_not_said_to_be_served(format_name, scheme):
    (sentence,) = said("vLLM on a CPU", format_name, scheme)
    assert "vLLM on a CPU is not known to serve" in sentence


@pytest.mark.parametrize(
    ("format_name", "scheme", "served"),
    [
        ("compressed-tensors", INT8, True),
        ("compressed-tensors", Scheme(8, False, 64), True),
        ("gptq", INT8, True),
        ("gptq", Scheme(3, True, 64), False),
        ("gptq", Scheme(4, False, 64), False),
        ("bitsandbytes", NF4, False),
    ],
)
def test_a_gpu_is_a_row_of_its_own(format_name, scheme, served):
    assert (said("vLLM", format_name, scheme) == []) == served


def test_shapes_that_vllm_pads_on_a_gpu_are_refused_on_a_cpu():
    assert said("vLLM", "compressed-tensors", INT4, (341, 128)) == []
    (sentence,) = said("vLLM on a CPU", "compressed-tensors", INT4, (341, 128))
    assert "rows and columns divide by 32" in sentence and "341 rows" in sentence


def test_limits_of_devices_are_those_of_the_runtime_asked_about():
    (gpu,), (cpu,) = (limits_of(runtime, "compressed-tensors", {"a": W8A8}) for runtime in ("vLLM", "vLLM on a CPU"))
    assert "Blackwell" in gpu and "bfloat16" in cpu
