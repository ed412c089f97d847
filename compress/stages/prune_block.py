"""Inside a block while its forward passes are held: sums, choice, refit, and the record of what went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.architecture import InputGroup
from compress.calibration.statistics import InputStatistics
from compress.calibration.walk import Arrival
from compress.checkpoints.reader import torch_dtype
from compress.events import Event
from compress.memory.measure import trim
from compress.pruning.choose import columns_of, kept_by_activation, kept_by_magnitude, kept_by_obs
from compress.pruning.follow import followed
from compress.pruning.refit import output_error, refitted
from compress.pruning.surgery import Cut, Kind, sliced, written_norms
from compress.quantization.target_shift import RIDGE, shift_of

if TYPE_CHECKING:
    from compress.stages.structured_prune import PruneRun


@dataclass(frozen=True)
class Place:
    """A block that stays: its number in the source, and in the result."""

    before: int
    after: int


class BlockWork:
    """Statistics, choices and refits of one block while its forward passes are held."""

    def __init__(self, run: PruneRun, place: Place, block: nn.Module) -> None:
        self.run, self.place, self.block = run, place, block
        self.transposed = run.architecture.transposed_linears
        self.prefix = run.architecture.block_name(place.before)
        self.written: dict[str, Tensor] = {}
        """New weights by name inside the block, of the old size."""
        self.cuts: dict[str, Cut] = {}
        self.pruned: list[dict[str, Any]] = []
        self.events: list[Event] = []
        self.shares: list[dict[str, Any]] = []
        self._statistics: InputStatistics | None = None
        self._held_out: InputStatistics | None = None

    def _wanted(self, group: InputGroup) -> bool:
        return group.linears[0] in self.run.kinds or self.run.stage.compensate

    def on_input(self, group: InputGroup, number: int, here: Arrival, there: Arrival | None) -> None:
        if not self._wanted(group):
            return
        with self.run.clock.timed("hessian"):
            columns, device = here.inputs.shape[-1], here.inputs.device
            if self._statistics is None:
                self._statistics = InputStatistics(columns, device, self.run.products)
                self._held_out = InputStatistics(columns, device, self.run.products)
            mask = self.run.batches[number].mask
            if there is None or not self.run.can_shift(columns):
                if number < self.run.fitted:
                    self._statistics.add(here.inputs, mask)
                return
            residual = None
            if here.residual is not None and there.residual is not None:
                residual = here.residual, there.residual
            statistics = self._statistics if number < self.run.fitted else self._held_out
            assert statistics is not None
            statistics.add_pair(here.inputs, there.inputs, mask, residual)

    def on_group(self, group: InputGroup) -> None:
        if self._statistics is None:
            return
        statistics, held_out = self._statistics, self._held_out
        self._statistics = self._held_out = None
        assert held_out is not None
        trim()
        with self.run.clock.timed("refit"):
            mismatch, judge = statistics.mismatch(), held_out.mismatch()
            (hessian, _), shift = statistics.hessian(), None
            if mismatch is not None and judge is not None:
                shift = shift_of(mismatch, 1.0, 1.0, RIDGE)
            if shift is None and self.run.stage.shifts:
                why = "too few calibration tokens" if mismatch is None else "no factor of the damped Hessian"
                self._event("target_shift_skipped", group.name, why)
        for name in group.linears:
            target = self._matrix(name)
            if shift is not None and judge is not None:
                with self.run.clock.timed("refit"):
                    found = followed(target, shift, judge)
                target = found.target
                shares = {"input_share": found.input_share, "residual_share": found.residual_share}
                self.shares.append({"name": f"{self.prefix}.{name}", **shares})
            if name in self.run.kinds:
                self._prune(name, target, hessian)
            elif shift is not None:
                self._put(name, target)

    def _prune(self, name: str, target: Tensor, hessian: Tensor) -> None:
        stage, clock = self.run.stage, self.run.clock
        kind, keep = self.run.kinds[name]
        with clock.timed("choose"):
            kept = self._chosen(name, kind, keep, target, hessian)
        self.cuts[name] = Cut(kind, kept.cpu())
        columns = columns_of(kept, kind.width)
        with clock.timed("refit"):
            done = refitted(target, hessian, columns, stage.ridge) if stage.compensate else None
            if stage.compensate and done is None:
                self._event("refit_skipped", name, "the damped Hessian of the columns that stay has no factor")
            whole = torch.zeros_like(target)
            whole[:, columns] = target[:, columns] if done is None else done.weight
            plain = output_error(target, None, hessian, columns) if done is None else done.plain_error
        self._put(name, whole)
        self.pruned.append(
            {
                "block": self.place.before,
                "reader": name,
                "kept": kept.tolist(),
                "error": plain if done is None else done.error,
                "error_without_refit": plain,
            }
        )

    def _chosen(self, name: str, kind: Kind, keep: int, target: Tensor, hessian: Tensor) -> Tensor:
        how = self.run.stage.importance
        if how == "obs":
            kept = kept_by_obs(target, hessian, kind.width, keep, self.run.stage.ridge)
            if kept is not None:
                return kept
            self._event(
                "importance_fallback", name, "the damped Hessian has no factor; pieces were chosen by activation"
            )
        if how == "magnitude":
            state = dict(self.block.named_parameters())
            return kept_by_magnitude(target, written_norms(state, kind, self.transposed), kind.width, keep)
        return kept_by_activation(target, hessian, kind.width, keep)

    def _matrix(self, name: str) -> Tensor:
        weight = self.block.get_submodule(name).get_parameter("weight").data.float()
        return weight.T.contiguous() if self.transposed else weight

    def _put(self, name: str, matrix: Tensor) -> None:
        """Replace a linear's weight (rows, columns), as the file will hold it."""
        weight = (matrix.T if self.transposed else matrix).to(self._stored_dtype(name)).contiguous()
        self.written[f"{name}.weight"] = weight
        compute = weight.to(self.run.context.compute)
        self.block.get_submodule(name).weight = nn.Parameter(compute, requires_grad=False)

    def _stored_dtype(self, name: str) -> torch.dtype:
        """Of a linear's weight in the source; of its values, where it is kept in codes."""
        module = f"{self.prefix}.{name}"
        if module in self.run.source.schemes:
            return self.run.context.stored
        return torch_dtype(self.run.source.header(f"{module}.weight")[0])

    def _event(self, kind: str, where: str, message: str) -> None:
        self.events.append(Event(kind, f"{self.prefix}.{where}", message))

    def record(self) -> dict[str, Any]:
        return {
            "modules": [],
            "events": [event.to_json() for event in self.events],
            "pruned": self.pruned,
            "shares": self.shares,
        }

    def tensors(self) -> dict[str, Tensor]:
        """What the block becomes, by full name in the result."""
        after, cuts = self.run.architecture.block_name(self.place.after), list(self.cuts.values())
        found = {}
        for name, stored in self.run.source.dense_state(self.prefix).items():
            tensor = self.written.get(name, stored)
            found[f"{after}.{name}"] = sliced(tensor.cpu(), name, cuts, self.transposed)
        return found
