"""What only a GPU can show: 16-bit sums, TF32, integer products, threads beside the work, and the same codes as a CPU.

Skipped without CUDA. `docs/benchmarks/gpu.md` says when and where they ran last. The kernels have tests of their own in
`quantization/test_columns.py`.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from compress.calibration.statistics import InputStatistics
from compress.checkpoints.overlap import ReadAhead, WriteBehind
from compress.checkpoints.reader import Checkpoint
from compress.quantization.gptq import energy
from compress.quantization.inputs import integer_product
from compress.stages import BitsAndBytesStage, Gptq, RoundToNearest
from tests.tiny import CPU, apply_stage, our_logits, random_model, random_windows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
GPU = torch.device("cuda")


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    random_model("llama", folder, num_hidden_layers=3)
    return folder


@pytest.mark.parametrize("columns", [40, 2500])
def test_sums_of_16_bit_inputs_are_those_of_float64(columns):
    """Products of bfloat16 numbers are exact in float32: what is left is float32's rounding of sums."""
    here, there = (_random(2, 300, columns, seed=seed).bfloat16() for seed in range(2))
    there = (here.float() + 0.01 * there.float()).bfloat16()
    mask = (torch.arange(600).view(2, 300) % 7 > 0).long()
    statistics = InputStatistics(columns, GPU)
    statistics.add_pair(here.cuda(), there.cuda(), mask, (here[..., :16].cuda(), there[..., :16].cuda()))

    x, y = (each.double()[mask.bool()] for each in (here, there))
    mismatch = statistics.mismatch()
    torch.testing.assert_close(mismatch.hessian.cpu(), x.T @ x / len(x), rtol=1e-5, atol=1e-5)
    expected = (y - x).T @ x / len(x)
    size = float(expected.abs().mean())
    assert float((mismatch.cross.cpu() - expected).abs().mean()) < 5e-3 * size
    assert float((mismatch.residual.cpu() - expected[:16]).abs().mean()) < 5e-3 * size


def test_errors_in_tf32_keep_four_digits_and_leave_the_setting_alone():
    rows, mixed = _random(300, 1000), _random(2000, 1000, seed=1)
    hessian = mixed.T @ mixed / 2000
    before = torch.get_float32_matmul_precision()

    found = energy(rows.cuda(), hessian.cuda())

    assert found == pytest.approx(float(((rows.double() @ hessian.double()) * rows).sum()), rel=1e-4)
    assert torch.get_float32_matmul_precision() == before == "highest"


@pytest.mark.parametrize(("tokens", "columns", "rows"), [(1, 8, 8), (5, 33, 7), (40, 1500, 96)])
def test_integer_products_are_exact_on_a_gpu(tokens, columns, rows):
    generator = torch.Generator().manual_seed(columns)
    left, right = (torch.randint(-128, 128, (n, columns), generator=generator).to(torch.int8) for n in (tokens, rows))

    found = integer_product(left.cuda(), right.cuda())

    assert torch.equal(found.cpu().long(), left.long() @ right.long().T)


def test_blocks_are_read_ahead_and_are_what_the_checkpoint_says(model):
    checkpoint = Checkpoint(model)
    names = [f"model.layers.{index}" for index in range(3)]
    with ReadAhead(checkpoint, names, GPU, torch.bfloat16) as ahead:
        for name in (names[1], names[0], names[1], names[2]):
            state = ahead.state(name)
            for leaf, tensor in checkpoint.dense_state(name).items():
                assert state[leaf].device.type == "cuda"
                assert torch.equal(state[leaf].cpu(), tensor.bfloat16())


def test_what_fails_behind_is_raised_by_the_next_or_at_the_end():
    def fail():
        raise OSError(28, "full")

    with pytest.raises(OSError), WriteBehind(GPU) as behind:
        behind.do(fail)
        behind.do(lambda: None)
    with pytest.raises(OSError), WriteBehind(GPU) as behind:
        behind.do(fail)


@pytest.mark.parametrize("quality", ["fast", "balanced", "max"])
def test_gptq_gives_nearly_the_codes_of_a_cpu(model, tmp_path, quality):
    """float32 on both. Sums in another order move weights between two codes and may decide whether a refinement is
    kept; from there on codes drift apart, but not errors. Token weights are drawn otherwise on a GPU."""
    windows, stage = random_windows(count=64), Gptq(group_size=32, quality=quality)
    _, ours = apply_stage(stage, model, tmp_path / "gpu", windows, device=GPU)
    _, theirs = apply_stage(stage, model, tmp_path / "cpu", windows)

    here, there = (load_file(tmp_path / name / "block-00000.safetensors") for name in ("gpu", "cpu"))
    for name in (each for each in there if each.endswith(".codes")):
        assert quality != "fast" or (here[name] == there[name]).float().mean() > 0.97, name
    mean = [sum(module["error"] for module in each.modules) / len(each.modules) for each in (ours, theirs)]
    assert mean[0] == pytest.approx(mean[1], rel=0.05)
    assert [event.kind for event in ours.events] == [event.kind for event in theirs.events]


def test_low_memory_on_a_gpu_gives_the_same_bytes(model, tmp_path):
    windows = random_windows(count=64)
    for name, low in (("held", False), ("replayed", True)):
        apply_stage(Gptq(group_size=32, low_memory=low), model, tmp_path / name, windows, device=GPU)
    for path in sorted((tmp_path / "held").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "replayed" / path.name).read_bytes(), path.name


def test_bfloat16_on_a_gpu_is_as_good_as_float32(model, tmp_path):
    source, windows = our_logits(model, random_windows(seed=99)).log_softmax(-1), random_windows(count=64)
    distances = {}
    for name, stage, compute in (
        ("float32", Gptq(bits=3, group_size=32), torch.float32),
        ("bfloat16", Gptq(bits=3, group_size=32), torch.bfloat16),
        ("rounding", RoundToNearest(bits=3, group_size=32), torch.float32),
    ):
        apply_stage(stage, model, tmp_path / name, windows, device=GPU, compute=compute)
        logits = our_logits(tmp_path / name, random_windows(seed=99)).log_softmax(-1)
        distances[name] = float((source.exp() * (source - logits)).sum(-1).mean())

    assert distances["bfloat16"] < 1.1 * distances["float32"] < 1.1 * distances["rounding"]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_bitsandbytes_stages_give_the_codes_of_a_cpu(model, tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    for name, device in (("gpu", GPU), ("cpu", CPU)):
        apply_stage(BitsAndBytesStage(type=kind, group_size=32), model, tmp_path / name, None, device=device)
    for path in sorted((tmp_path / "cpu").glob("block-*.safetensors")):
        here, there = load_file(tmp_path / "gpu" / path.name), load_file(path)
        for name, tensor in there.items():
            if name.endswith(".codes"):
                # Its kernels draw the borders between two of FP4's values elsewhere on a GPU: 0.995 of the codes agree.
                assert (here[name] == tensor).float().mean() > (0.99 if kind == "fp4" else 0.999), name
