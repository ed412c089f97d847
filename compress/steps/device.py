"""What a run takes of a GPU's memory, predicted: the stage that needs most, and the whole run where that is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from compress.memory import predict
from compress.memory.measure import free_bytes
from compress.recipe import Recipe
from compress.stages import Gptq, Stage
from compress.steps.costs import samples_text
from compress.steps.environment import Machine, fits


@dataclass(frozen=True)
class DevicePeaks:
    """Bytes of tensors on a GPU, and of pinned memory on its host."""

    calibrating: int
    """Of the stage that takes most; it has to fit."""
    in_low_memory: int
    """The same, were `low_memory` set on every `gptq`."""
    run: int | None
    """Of the run with its reload; None where a part is not predicted: training, sampling text, latency."""
    pinned: int
    """Hidden states that wait on the host."""

    def shortage(self, machine: Machine) -> str | None:
        """Why calibration does not fit, and what would help; None where it does."""
        free = free_bytes(machine.device)
        if self.calibrating <= free:
            return None
        low = "`low_memory: true` on gptq, " if self.in_low_memory < self.calibrating else ""
        return (
            f"device memory: about {self.calibrating:,} bytes are needed while stages run and {free:,} are free. Use "
            f"{low}fewer calibration windows, or a larger GPU."
        )


def device_peaks(recipe: Recipe, load_of: Callable[[Recipe], predict.WalkLoad], machine: Machine) -> DevicePeaks | None:
    """The peaks of a recipe; None on a CPU. `load_of` gives what lies on the device for the stages of a recipe."""
    if machine.device.type == "cpu":
        return None

    def loads(stages: Iterable[Stage]) -> list[predict.WalkLoad]:
        return [load_of(recipe.model_copy(update={"stages": (stage,)})) for stage in stages if stage.activation_streams]

    def calibrating(stages: Iterable[Stage]) -> int:
        peaks = [predict.calibration_device_bytes(load, machine.tokens_at_once) for load in loads(stages)]
        return max(peaks, default=0)

    low = [
        stage.model_copy(update={"low_memory": True}) if isinstance(stage, Gptq) else stage for stage in recipe.stages
    ]
    load = load_of(recipe)
    heads = 2 * load.vocabulary * load.hidden * load.compute_bytes
    reload = load.parameters * 4 if fits(load.parameters, 0, machine) else 0
    known = not (any(stage.training for stage in recipe.stages) or samples_text(recipe) or recipe.latency)
    needed = calibrating(recipe.stages)
    waiting = [
        predict.pinned_bytes(each, machine.tokens_at_once) for each in loads(s for s in recipe.stages if s.replays)
    ]
    return DevicePeaks(needed, calibrating(low), max(needed, heads, reload) if known else None, max(waiting, default=0))
