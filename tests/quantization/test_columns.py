"""The column loop: all kernels give the same codes, and the codes that the definition gives.

Most inputs here are whole multiples of a small power of two, and so small that float32 holds every sum exactly. Then
the order of summation cannot matter, ties are real ties, and "the same" means every bit, on any machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from compress.quantization import columns as columns_module
from compress.quantization import gpu as gpu_module
from compress.quantization.columns import ColumnGrid, TorchRounder, column_kernel, solve_columns
from compress.quantization.factor import factorise
from compress.quantization.gptq import choose_grid
from compress.quantization.grid import Grid, dequantize
from compress.quantization.grid_search import group_errors
from compress.quantization.refine import Swept, descended, moments
from compress.quantization.scheme import BITS, Scheme
from tests.helpers import PROJECT, environment
from tests.quantization.test_gptq import correlated, hessian_of, lost

interpreted = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton, and TRITON_INTERPRET=1 before it is imported",
)
compiled = pytest.mark.skipif(find_spec("numba") is None, reason="needs numba")
OTHERS = [pytest.param("triton", marks=interpreted), pytest.param("numba", marks=compiled)]
KERNELS = ["torch", *OTHERS]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@dataclass(frozen=True)
class Problem:
    weight: Tensor
    order: Tensor
    upper: Tensor
    grid: Grid

    def codes(self, kernel: str, block: int = 64) -> Tensor:
        return solve_columns(self.weight, self.order, self.upper, self.grid, block, kernel)


def exact_problem(rows: int, columns: int, scheme: Scheme, stored: torch.dtype, seed: int = 0) -> Problem:
    """Weights in multiples of 1/16; scales 1/8 to 7/8 of either sign; U has 1/2 or 1 on its diagonal, few +-1."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).float()

    groups = scheme.groups(columns)
    sign = 1 - 2 * whole(0, int(scheme.symmetric), rows, groups)
    scale = sign * whole(1, 7, rows, groups) / 8
    zero = None if scheme.symmetric else whole(scheme.lowest, scheme.highest, rows, groups).to(torch.int8)
    # Few errors reach a column, or clipped columns would drive later ones out of float32's exact range.
    chosen = torch.rand(columns, columns, generator=generator) < 1.5 / columns
    upper = (chosen * (1 - 2 * whole(0, 1, columns, columns))).triu(1)
    upper += torch.diag(whole(1, 2, columns) / 2)
    weight = whole(-24, 24, rows, columns) / 16 * 2.0 ** (scheme.bits - 2)
    order = torch.randperm(columns, generator=generator)
    return Problem(weight, order, upper, Grid(scheme, scale.to(stored), zero))


def rounder_of(kernel: str):
    if kernel == "triton":
        from compress.quantization.triton_columns import TritonRounder

        return TritonRounder
    from compress.quantization.numba_columns import NumbaRounder

    return NumbaRounder


def by_definition(problem: Problem) -> Tensor:
    """Codes in rational numbers; only 1 / scale is float32's, as in the kernels."""
    grid, width = problem.grid, problem.grid.scheme.width(len(problem.order))
    upper = [[Fraction(number) for number in row] for row in problem.upper.tolist()]
    codes = torch.zeros_like(problem.weight, dtype=torch.int8)
    for row, weights in enumerate(problem.weight[:, problem.order].tolist()):
        work = [Fraction(number) for number in weights]
        for j, column in enumerate(problem.order.tolist()):
            scale = grid.scale[row, column // width]
            zero = 0 if grid.zero is None else int(grid.zero[row, column // width])
            ideal = torch.tensor(float(work[j])) * scale.float().reciprocal() + zero
            code = max(grid.scheme.lowest, min(grid.scheme.highest, round(float(ideal))))
            value = Fraction(float((torch.tensor(code - zero) * scale.float()).to(scale.dtype)))
            error = (work[j] - value) / upper[j][j]
            work[j + 1 :] = [each - error * u for each, u in zip(work[j + 1 :], upper[j][j + 1 :], strict=True)]
            codes[row, column] = code
    return codes


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_torch_codes_are_those_of_the_definition(bits, symmetric, stored):
    problem = exact_problem(4, 24, Scheme(bits, symmetric, 8), stored, seed=bits)

    assert torch.equal(problem.codes("torch", block=10), by_definition(problem))


@pytest.mark.parametrize("kernel", OTHERS)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_codes_and_errors_are_torchs(bits, symmetric, stored, kernel):
    """One block; more rows than one program of Triton takes, and columns that are no power of two."""
    problem = exact_problem(37, 24, Scheme(bits, symmetric, 8), stored, seed=bits)
    results = []
    for rounder in (TorchRounder, rounder_of(kernel)):
        tile = problem.weight.T[problem.order].contiguous()
        codes, errors = torch.empty_like(tile, dtype=torch.int8), torch.empty_like(tile)
        rounder(ColumnGrid.of(problem.grid, problem.order)).round_block(0, tile, problem.upper, codes, errors)
        results.append((codes, errors))

    (codes, errors), (other_codes, other_errors) = results
    assert torch.equal(codes, other_codes) and torch.equal(errors, other_errors)
    assert len(codes.unique()) >= min(2**bits, 24), "most of the grid is used"


@pytest.mark.parametrize("kernel", OTHERS)
@pytest.mark.parametrize(
    ("rows", "columns", "group", "block"),
    [
        pytest.param(1, 64, 16, 64, id="one row, one block"),
        pytest.param(33, 40, None, 16, id="channel-wise, last block narrow"),
        pytest.param(32, 96, 8, 32, id="rows and columns fill their tiles"),
        pytest.param(3, 136, 4, 128, id="wide block, narrow groups"),
        pytest.param(2, 600, 100, 64, id="two spans"),
        pytest.param(300, 24, 8, 16, id="more rows than lanes"),
    ],
)
def test_codes_are_torchs_in_every_shape(rows, columns, group, block, kernel):
    problem = exact_problem(rows, columns, Scheme(4, columns % 3 > 0, group), torch.float16, seed=columns)

    assert torch.equal(problem.codes(kernel, block), problem.codes("torch"))


@pytest.mark.parametrize("kernel", OTHERS)
@pytest.mark.parametrize("scale", [1, 1e-5], ids=["normal scales", "subnormal values"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_a_real_problem_is_solved_as_well_as_by_torch(symmetric, stored, scale, kernel):
    """Sums are rounded here, so a weight half way between two codes may go either way; nothing else may differ."""
    weight = torch.randn(20, 96, generator=torch.Generator().manual_seed(3)) * scale
    hessian = hessian_of(correlated(400, 96, seed=3))
    factor = factorise(hessian, 0.01)
    grid = choose_grid(weight, factor.pivots, Scheme(3, symmetric, 32), stored, "weighted")
    problem = Problem(weight, factor.order, factor.upper, grid)

    ours, theirs = problem.codes(kernel), problem.codes("torch")

    assert (ours == theirs).float().mean() >= 0.99
    first, second = (lost(weight, dequantize(codes, grid), hessian) for codes in (ours, theirs))
    assert first == pytest.approx(second, rel=1e-2)


@pytest.mark.parametrize("kernel", OTHERS)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("rows", "columns", "group"), [(37, 24, 8), (33, 150, None), (3, 600, 100)])
def test_a_sweep_is_torchs(rows, columns, group, symmetric, stored, kernel):
    """H has powers of two on its diagonal and few other numbers, all whole: every sum is exact, at most a tie apart."""
    problem = exact_problem(rows, columns, Scheme(4, symmetric, group), stored, seed=columns)
    hessian = exact_hessian(columns)
    start = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(1)).to(torch.int8)

    ours, theirs = (
        descended(problem.weight, start, problem.grid, Swept.of(hessian), kernel=each) for each in (kernel, "torch")
    )

    assert torch.equal(ours, theirs)
    assert (theirs != start).float().mean() > 0.5, "the sweep moved most codes"


def exact_hessian(columns: int) -> Tensor:
    """Symmetric; 8 or 16 on the diagonal, few +-1 elsewhere."""
    generator = torch.Generator().manual_seed(columns)
    chosen = (torch.rand(columns, columns, generator=generator) < 1.5 / columns).float().triu(1)
    signs = 1 - 2 * torch.randint(0, 2, (columns, columns), generator=generator).float()
    beside = chosen * signs
    return beside + beside.T + torch.diag(8.0 * torch.randint(1, 3, (columns,), generator=generator))


@interpreted
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("rows", "columns", "group"), [(5, 48, 16), (3, 1300, None), (40, 96, 32)])
def test_the_error_of_a_grid_in_one_pass_is_torchs(rows, columns, group, symmetric, stored):
    """Channel-wise rows are wider than what a program holds at a time."""
    from compress.quantization.triton_grid import weighted_error

    scheme = Scheme(4, symmetric, group)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    importance = torch.rand(scheme.groups(columns), scheme.width(columns), generator=torch.Generator().manual_seed(2))
    grid = choose_grid(weight, None, scheme, stored, "minmax")
    grouped = weight.view(rows, scheme.groups(columns), -1)

    torch.testing.assert_close(weighted_error(grouped, importance, grid), group_errors(grouped, importance, grid))


@interpreted
@pytest.mark.parametrize(("rows", "groups", "width"), [(5, 3, 16), (70, 2, 64), (1, 1, 128)])
def test_moments_of_triton_are_torchs(rows, groups, width):
    """Whole numbers, so that sums are exact. In float32, since the interpreter multiplies no bfloat16."""
    from compress.quantization import triton_moments

    integers, hessian = exact_moments(rows, groups, width)

    assert torch.equal(triton_moments.moments(integers, hessian, torch.float32), moments(integers, hessian))
    values = integers.double()
    expected = torch.einsum("rgi,gihj,rhj->rgh", values, hessian.double().view(groups, width, groups, width), values)
    assert torch.equal(moments(integers, hessian).double(), expected.tril())


def exact_moments(rows: int, groups: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    integers = torch.randint(-8, 8, (rows, groups, width), generator=generator).to(torch.int16)
    mixed = torch.randint(-2, 3, (groups * width, groups * width), generator=generator).float()
    return integers, mixed + mixed.T


@pytest.mark.parametrize("kernel", KERNELS)
def test_halves_are_rounded_to_even(kernel):
    scheme = Scheme(4, True, None)
    weight = torch.tensor([[-9.5, -8.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.5]])
    grid = Grid(scheme, torch.ones(1, 1), None)

    problem = Problem(weight, torch.arange(10), torch.eye(10), grid)

    assert problem.codes(kernel).tolist() == [[-8, -8, -2, -2, 0, 0, 2, 2, 6, 7]]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_example_of_the_module(kernel):
    grid = Grid(Scheme(4, True, None), torch.ones(1, 1), None)
    upper = torch.tensor([[1.0, 0.5], [0.0, 1.0]])

    problem = Problem(torch.tensor([[0.4, 0.6]]), torch.arange(2), upper, grid)

    assert problem.codes(kernel).tolist() == [[0, 0]], "0.6 alone would be 1"


def test_a_device_gets_compiled_columns_where_their_package_is(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")

    for found, kernel in ((None, "torch"), ("a spec", "triton")):
        monkeypatch.setattr(gpu_module, "find_spec", lambda name, found=found: found)
        assert column_kernel(gpu) == kernel
    for found, kernel in ((False, "torch"), (True, "numba")):
        monkeypatch.setattr(columns_module, "has_numba", lambda found=found: found)
        assert column_kernel(cpu) == kernel


@compiled
def test_a_folder_that_cannot_be_written_leaves_numba_without_a_cache(monkeypatch):
    from compress.quantization import numba_columns

    real = numba_columns.numba.njit

    def refusing(**options):
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(numba_columns.numba, "njit", refusing)

    assert numba_columns._compiled(lambda number: number + 1)(2) == 3


def test_the_cpu_never_imports_triton():
    program = """
import sys, torch
from compress.quantization.factor import factorise
from compress.quantization.gptq import solve
from compress.quantization.scheme import Scheme
hessian = torch.eye(8, dtype=torch.float64)
solve([torch.randn(2, 8)], hessian, factorise(hessian, 0.01), Scheme(4, True, 8), torch.float16)
sys.exit("triton" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], env=environment(), cwd=PROJECT, check=True)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_the_kernel_compiles_for_a_gpu(tmp_path):
    """What the interpreter cannot see: types, and that the compiler fuses and approximates nothing on its own."""
    program = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from compress.quantization.triton_columns import OPTIONS, _round_block
types = dict(tile="*fp32", corner="*fp32", group="*i64", scale="*fp32", zero="*fp32", codes="*i8", errors="*fp32",
             rows="i32", count="i32", lowest="fp32", highest="fp32")
for stored in ("fp16", "bf16", "fp32"):
    constants = dict(ASYMMETRIC=True, STORED=stored, ROWS=32, COLUMNS=64)
    source = ASTSource(_round_block, types | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS)
    assert len(made.asm["cubin"]) > 0
    assert made.metadata.shared <= 48 * 1024
    ptx = made.asm["ptx"]
    assert set(re.findall(r"div\\.\\w+", ptx)) == {"div.rn"}
    # 64 x 32 elements by 32 lanes: one fused step each, that of the update.
    assert ptx.count("fma.rn.f32") == 64, ptx.count("fma.rn.f32")
    assert "fma.rn.ftz" not in ptx
    assert "0f4B400000" in ptx and "0fCB400000" in ptx, "the rounding by 1.5 * 2^23 was optimised away"

from compress.quantization.triton_columns import _sweep_block
del types["errors"]
types |= dict(values="*fp32", moved="*fp32")
constants = dict(ASYMMETRIC=True, STORED="bf16", ROWS=32, COLUMNS=64)
source = ASTSource(_sweep_block, types | dict.fromkeys(constants, "constexpr"), constexprs=constants)
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS).asm["ptx"]
assert ptx.count("fma.rn.f32") == 64 and "0f4B400000" in ptx and set(re.findall(r"div\\.\\w+", ptx)) == {"div.rn"}

from compress.quantization.triton_grid import _weighted_error
types = dict(grouped="*fp32", weights="*fp32", scale="*fp32", zero="*fp32", error="*fp32", count="i32", groups="i32",
             width="i32", lowest="fp32", highest="fp32")
constants = dict(ASYMMETRIC=True, ITEMS=32, CHUNK=64)
source = ASTSource(_weighted_error, types | dict.fromkeys(constants, "constexpr"), constexprs=constants)
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
assert "0f4B400000" in ptx and "0fCB400000" in ptx

from compress.quantization.triton_moments import _moments, options
for width in (16, 32, 64, 128):
    types = dict(integers="*bf16", hessian="*bf16", found="*fp32", rows="i32", groups="i32")
    how = options(width)
    constants = dict(WIDTH=width, ROWS=how.pop("ROWS"))
    source = ASTSource(_moments, types | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=how)
    assert made.metadata.shared <= 100 * 1024, (width, made.metadata.shared)
"""
    made = subprocess.run(
        [sys.executable, "-c", program],
        env=environment({"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}),
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("triton") is None, reason="needs a GPU and triton")
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("rows", "columns", "group"), [(33, 40, None), (300, 1200, 100)])
def test_a_gpu_gives_the_codes_of_the_cpu(rows, columns, group, symmetric, stored):
    problem = exact_problem(rows, columns, Scheme(4, symmetric, group), stored)
    grid = problem.grid
    moved = Problem(
        problem.weight.cuda(),
        problem.order.cuda(),
        problem.upper.cuda(),
        Grid(grid.scheme, grid.scale.cuda(), None if grid.zero is None else grid.zero.cuda()),
    )

    expected = problem.codes("torch")
    for kernel in ("torch", "triton"):
        assert torch.equal(moved.codes(kernel).cpu(), expected), kernel

    hessian = exact_hessian(columns)
    swept = descended(problem.weight, expected, grid, Swept.of(hessian), kernel="torch")
    for kernel in ("torch", "triton"):
        ours = descended(moved.weight, expected.cuda(), moved.grid, Swept.of(hessian.cuda()), kernel=kernel)
        assert torch.equal(ours.cpu(), swept), kernel

    scheme = grid.scheme
    grouped = problem.weight.view(rows, scheme.groups(columns), -1)
    importance = torch.rand(scheme.groups(columns), scheme.width(columns))
    on_gpu = group_errors(grouped.cuda(), importance.cuda(), moved.grid)
    torch.testing.assert_close(on_gpu.cpu(), group_errors(grouped, importance, grid))

    for width in (32, 64, 128, 100):
        integers, hessian = exact_moments(rows, 3, width)
        assert torch.equal(moments(integers.cuda(), hessian.cuda()).cpu(), moments(integers, hessian)), width
