"""Inside a block while its forward passes are held: sums, factor, and every linear solved in every candidate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from compress.architecture import InputGroup
from compress.calibration.fisher import rounding_cost
from compress.calibration.outputs import ATTENTION, row_bands, skipped
from compress.calibration.statistics import InputStatistics
from compress.calibration.walk import Arrival
from compress.events import Event
from compress.memory.measure import trim
from compress.quantization.factor import factorise
from compress.quantization.gptq import solve
from compress.quantization.grid import Grid, dequantize
from compress.quantization.inputs import rounded_inputs
from compress.quantization.scheme import Option

if TYPE_CHECKING:
    from compress.stages.sensitivity import SensitivityRun


DAMPING = 0.01


@dataclass(frozen=True)
class _Solved:
    """A linear in one scheme: codes and grid (None where it is left as it is), cost in nats a token, relative error."""

    found: tuple[Tensor, Grid] | None
    cost: float
    error: float


class BlockWork:
    """Statistics and candidates of one block while its forward passes are held."""

    def __init__(self, run: SensitivityRun, prefix: str, index: int, block: nn.Module) -> None:
        self.run, self.prefix, self.index, self.block = run, prefix, index, block
        self.found: dict[str, list[tuple[Tensor, Grid] | None]] = {}
        self.records: dict[str, list[dict[str, Any]]] = {}
        self.events: list[Event] = []
        self._statistics: InputStatistics | None = None
        self._roundings: InputStatistics | None = None
        """Of what becomes of inputs where candidates make integers of them: rounded less unrounded."""
        self._usable = run.outputs.usable([f"{prefix}.{name}" for name in run.skeleton.architecture.linears])
        if not self._usable:
            self.events.append(skipped(prefix))
        self._rounds = any(each.inputs != "none" for each in run.stage.candidates)

    def on_input(self, group: InputGroup, number: int, here: Arrival, there: Arrival | None) -> None:
        with self.run.clock.timed("hessian"):
            if self._statistics is None:
                self._statistics = InputStatistics(here.inputs.shape[-1], here.inputs.device, self.run.products)
            batch, weights = self.run.batches[number], None
            mask = batch.mask
            if group.name == ATTENTION and self._usable:
                weights = self.run.outputs.token_weights(self.index, self.run.starts[number], batch)
            self._statistics.add(here.inputs, mask, weights)
            if self._rounds:
                if self._roundings is None:
                    self._roundings = InputStatistics(here.inputs.shape[-1], here.inputs.device, self.run.products)
                self._roundings.add(rounded_inputs(here.inputs) - here.inputs, mask, weights)

    def on_group(self, group: InputGroup) -> None:
        assert self._statistics is not None
        statistics, self._statistics = self._statistics, None
        roundings, self._roundings = self._roundings, None
        stage, clock = self.run.stage, self.run.clock
        names = [name for name in group.linears if stage.options(f"{self.prefix}.{name}")]
        if not names:
            return
        trim()
        with clock.timed("factorise"):
            hessian, _ = statistics.hessian()
            factor = factorise(hessian, DAMPING)
            single = hessian.float()
            of_rounding = None if roundings is None else roundings.hessian()[0].float()
        if factor is None:
            where = f"{self.prefix}.{'+'.join(names)}"
            message = "candidates rounded to nearest: no damping on the ladder made the Hessian definite"
            self.events.append(Event("rounding_fallback", where, message))
        bands = row_bands(self.run.outputs, self.prefix, names, self.run.context.device) if self._usable else {}
        transposed = self.run.skeleton.architecture.transposed_linears
        matrices = [self.block.get_submodule(name).get_parameter("weight").data.float() for name in names]
        weights = [weight.T.contiguous() if transposed else weight for weight in matrices]
        full = [f"{self.prefix}.{name}" for name in names]
        sensitivities = [self.run.outputs.sensitivities(name) for name in full]
        moments = [self.run.outputs.moments(name) if self._usable else None for name in full]
        # An override may make one scheme of two candidates; that is solved once.
        known: dict[tuple[int, Option], _Solved] = {(at, None): _Solved(None, 0.0, 0.0) for at in range(len(names))}
        for number in range(len(stage.candidates)):
            schemes = [stage.options(f"{self.prefix}.{name}")[number] for name in names]
            for scheme in dict.fromkeys(schemes):
                which = [at for at, each in enumerate(schemes) if each == scheme and (at, each) not in known]
                if scheme is None or not which:
                    continue
                with clock.timed("solve"):
                    stored, outputs = self.run.context.stored, [bands[names[at]] for at in which] if bands else None
                    chosen = [weights[at] for at in which]
                    solutions = solve(chosen, single, factor, scheme, stored, outputs=outputs)
                    for at, solution in zip(which, solutions, strict=True):
                        value = dequantize(solution.codes, solution.grid).float()
                        told = sensitivities[at], moments[at]
                        cost = rounding_cost(value - weights[at], single, *told)
                        if scheme.inputs and of_rounding is not None:
                            cost += rounding_cost(value, of_rounding, *told)
                        known[at, scheme] = _Solved((solution.codes, solution.grid), cost, solution.error)
            for at, scheme in enumerate(schemes):
                self._keep(f"{self.prefix}.{names[at]}", weights[at], known[at, scheme], scheme)

    def _keep(self, module: str, weight: Tensor, solved: _Solved, scheme: Option) -> None:
        self.found.setdefault(module, []).append(solved.found)
        shape, itemsize = (weight.shape[0], weight.shape[1]), self.run.context.stored.itemsize
        size = self.run.stage.option_bytes(scheme, shape, itemsize)
        self.records.setdefault(module, []).append(record_of(scheme, solved.cost, solved.error, size))


def record_of(scheme: Option, cost: float, error: float, size: int) -> dict[str, Any]:
    """What is known of a candidate: its cost in nats a token, its relative error, its bytes."""
    return {"scheme": scheme and scheme.to_json(), "cost": cost, "error": error, "bytes": size}
