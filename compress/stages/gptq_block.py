"""Inside a block while its forward passes are held: sums, factor, shift, solve, and the record of what was done."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.architecture import InputGroup
from compress.calibration.outputs import ATTENTION, row_bands, skipped
from compress.calibration.statistics import InputStatistics
from compress.calibration.walk import Arrival
from compress.events import Event
from compress.memory.measure import trim
from compress.quantization.factor import Factor, factorise
from compress.quantization.gptq import Solution, solve
from compress.quantization.grid import Grid, dequantize
from compress.quantization.inputs import IntegerLinear, may_run_on_integers, rounded_inputs, run_on_integers
from compress.quantization.refine import Split
from compress.quantization.row_feedback import Band
from compress.quantization.scheme import Scheme
from compress.quantization.target_shift import Mismatch, targets_of

if TYPE_CHECKING:
    from compress.stages.gptq import GptqRun


class BlockWork:
    """Statistics and solutions of one block while its forward passes are under way."""

    def __init__(self, run: GptqRun, prefix: str, index: int, block: nn.Module) -> None:
        self.run, self.prefix, self.index, self.block = run, prefix, index, block
        self.quantised: dict[str, tuple[Tensor, Grid]] = {}
        self.records: list[dict[str, Any]] = []
        self.events: list[Event] = []
        self._statistics: InputStatistics | None = None
        names = [f"{prefix}.{name}" for name in run.skeleton.architecture.linears]
        self._outputs = run.outputs if run.outputs is not None and run.outputs.usable(names) else None
        if run.outputs is not None and self._outputs is None:
            self.events.append(skipped(prefix))
        for name in run.skeleton.architecture.linears:
            scheme = run.stage.scheme_of(f"{prefix}.{name}")
            if scheme is not None and scheme.inputs:
                may_run_on_integers(block.get_submodule(name))

    def on_input(self, group: InputGroup, number: int, here: Arrival, there: Arrival | None) -> None:
        if not any(self.run.stage.scheme_of(f"{self.prefix}.{name}") for name in group.linears):
            return
        with self.run.clock.timed("hessian"):
            if self._reads_integers(group):
                here = Arrival(rounded_inputs(here.inputs), here.residual)
            if self._statistics is None:
                self._statistics = InputStatistics(here.inputs.shape[-1], here.inputs.device, self.run.products)
            mask = self.run.batches[number].mask
            weights = self._weights(group, number)
            if there is None or not self.run.can_shift(here.inputs.shape[-1]):
                held = number >= self.run.fitted
                (self._statistics.hold_out if held else self._statistics.add)(here.inputs, mask, weights)
                return
            residual = None
            if self.run.stage.residual_shift and here.residual is not None and there.residual is not None:
                residual = (here.residual, there.residual)
            self._statistics.add_pair(here.inputs, there.inputs, mask, residual, weights)

    def _weights(self, group: InputGroup, number: int) -> Tensor | None:
        """What the tokens of a batch count for in the group's sums; None for 1."""
        if group.name == ATTENTION and self._outputs is not None:
            return self._outputs.token_weights(self.index, self.run.starts[number], self.run.batches[number])
        return self.run.weights[self.index, group.name][number] if self.run.weights else None

    def on_group(self, group: InputGroup) -> None:
        if self._statistics is None:
            return
        statistics, self._statistics = self._statistics, None
        # What the batches freed on their way here has other sizes than what they will hold next.
        trim()
        with self.run.clock.timed("hessian"):
            statistics.reduce()
        # The shift first: its sums are as large as H, and are gone before H is factorised.
        with self.run.clock.timed("factorise"):
            targets = self._targets(group, statistics.mismatch())
            hessian, split = statistics.hessian()
            factor = factorise(hessian, self.run.stage.damping)
        self._note(group, hessian, factor)
        if factor is None:
            targets = None
        elif targets is None and self.run.stage.shifts:
            self._note_no_shift(group, len(hessian))
        # Only errors are measured with H from here on, in float32.
        hessian = hessian.float()
        with self.run.clock.timed("factorise"):
            bands: dict[str, list[Band]] = {}
            if factor is not None and self._outputs is not None:
                bands = row_bands(self._outputs, self.prefix, group.linears, self.run.context.device)
        by_scheme: dict[Scheme, list[str]] = {}
        for name in group.linears:
            scheme = self.run.stage.scheme_of(f"{self.prefix}.{name}")
            if scheme is not None:
                by_scheme.setdefault(scheme, []).append(name)
        for scheme, names in by_scheme.items():
            self._solve(names, scheme, hessian, factor, targets, split, bands)
        del hessian, factor, targets, split, bands
        trim()

    def _targets(self, group: InputGroup, mismatch: Mismatch | None) -> dict[str, Tensor] | None:
        """Shifted weights (rows, columns) float32 by name, of the linears of the group that are quantised. Uses up the
        memory of `mismatch`."""
        stage = self.run.stage
        if mismatch is None:
            return None
        names = [name for name in group.linears if stage.scheme_of(f"{self.prefix}.{name}") is not None]
        weights = [self._matrix(name) for name in names]
        found = targets_of(mismatch, weights, stage.target_shift, stage.residual_shift, stage.shift_ridge)
        return None if found is None else dict(zip(names, found, strict=True))

    def _matrix(self, name: str) -> Tensor:
        """A linear's weight as (rows, columns) float32."""
        weight = self.block.get_submodule(name).get_parameter("weight").data.float()
        return weight.T if self.run.skeleton.architecture.transposed_linears else weight

    def _note_no_shift(self, group: InputGroup, columns: int) -> None:
        where, tokens = f"{self.prefix}.{'+'.join(group.linears)}", self.run.shifting_tokens
        reason = "no factor of its Hessian" if self.run.can_shift(columns) else f"{tokens} tokens for {columns} columns"
        self.events.append(Event("target_shift_skipped", where, f"target not shifted: {reason}"))

    def _note(self, group: InputGroup, hessian: Tensor, factor: Factor | None) -> None:
        where = f"{self.prefix}.{'+'.join(group.linears)}"
        if factor is None:
            finite = bool(torch.isfinite(hessian).all())
            reason = "no damping on the ladder made the Hessian definite" if finite else "its inputs are not finite"
            self.events.append(Event("rounding_fallback", where, f"rounded to nearest: {reason}"))
            return
        if factor.damping > self.run.stage.damping:
            message = f"damping raised from {self.run.stage.damping:g} to {factor.damping:g}"
            self.events.append(Event("damping_raised", where, message, {"damping": factor.damping}))
        if factor.dead:
            message = f"{factor.dead} of {len(factor.order)} input columns were never excited; rounded, not solved"
            self.events.append(Event("dead_columns", where, message, {"columns": factor.dead}))

    def _solve(
        self,
        names: list[str],
        scheme: Scheme,
        hessian: Tensor,
        factor: Factor | None,
        targets: dict[str, Tensor] | None,
        split: Split | None,
        bands: dict[str, list[Band]],
    ) -> None:
        """Solve linears with one scheme together and put the values a runtime will see into the block."""
        transposed = self.run.skeleton.architecture.transposed_linears
        started = time.perf_counter()
        with self.run.clock.timed("solve"):
            weights = [self._matrix(name) if targets is None else targets[name] for name in names]
            stored, scales = self.run.context.stored, self.run.stage.scales
            outputs = [bands[name] for name in names] if bands else None
            solutions = solve(weights, hessian, factor, scheme, stored, scales, split, outputs=outputs)
            for name, solution in zip(names, solutions, strict=True):
                linear = self.block.get_submodule(name)
                value = dequantize(solution.codes, solution.grid).to(self.run.context.compute)
                linear.weight = nn.Parameter(value.T if transposed else value, requires_grad=False)
                if scheme.inputs:
                    run_on_integers(linear, IntegerLinear(solution.codes, solution.grid.scale))
        spent = time.perf_counter() - started
        rows = sum(weight.shape[0] for weight in weights)
        for name, weight, solution in zip(names, weights, solutions, strict=True):
            module = f"{self.prefix}.{name}"
            self.quantised[module] = (solution.codes, solution.grid)
            if solution.kept_rounding:
                self.events.append(Event("rounding_kept", module, "rounding was better than solving, and was kept"))
            if solution.left_alone:
                message = "no feedback along rows: with it, the linear was worse than rounded by its own inputs"
                self.events.append(Event("outputs_skipped", module, message))
            share = spent * weight.shape[0] / rows
            self.records.append(self._record(module, scheme, solution, weight.shape, share, factor is None))

    def _reads_integers(self, group: InputGroup) -> bool:
        """Whether the group's inputs will be rounded when the model runs; the Hessian is then of rounded ones."""
        schemes = [self.run.stage.scheme_of(f"{self.prefix}.{name}") for name in group.linears]
        return any(scheme.inputs for scheme in schemes if scheme)

    def _record(
        self, module: str, scheme: Scheme, solution: Solution, shape: torch.Size, spent: float, fell_back: bool
    ) -> dict[str, Any]:
        rows, columns = shape
        return {
            "name": module,
            "block": self.index,
            "scheme": scheme.label,
            "error": solution.error,
            "rounding_error": solution.rounding_error,
            "damping": solution.damping,
            "refined": solution.refined,
            "seconds": spent,
            "effective_bits": 8 * scheme.stored_bytes(rows, columns) / (rows * columns),
            "events": ["rounding_fallback"] * fell_back + ["rounding_kept"] * solution.kept_rounding,
        }
