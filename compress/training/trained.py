"""What can be trained, and what is trained: tensors as small steps away from stored ones.

scales    of quantised linears              a relative change (`relative`)
norms     weights of norms                  a relative change
codes     of quantised linears              a step in units of a code, rounded (straight-through)
weights   linears that are not quantised    a step in units of the matrix's root mean square
lora      the same                          a product of two thin matrices, merged when it is stored (peft)

Everything is seen by the forward pass as it will be stored, except a LoRA product, which is rounded when merged.
Steps are relative to what they start from, except LoRA's, whose matrices start from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from compress.errors import EnvironmentLacksError
from compress.training.relative import through_storage

What = Literal["scales", "scales+norms", "norms", "codes", "weights", "lora"]
WAY_OF_CODES = 700.0
"""Learning rates that a code can come in all steps together: at a rate of a thousandth 0.7 of a code, whatever the
number of steps. Codes change by whole ones, and start no more than 0.3 on the way to the half."""
RATE_OF_CODES = 20.0
"""Learning rates that a code comes in one step, at most: in fewer than seventy steps codes come less far, and few
change. Faster, the divergence has no time to fall again after it rose."""


@dataclass(frozen=True)
class Trainable:
    """What is trained. `rank` is that of LoRA's matrices, `seed` of their first draw."""

    what: What
    rank: int = 16
    seed: int = 0

    @property
    def norms(self) -> bool:
        return self.what != "scales"

    @property
    def scales(self) -> bool:
        return self.what in ("scales", "scales+norms", "codes")


class Trained(Protocol):
    """A stored tensor with a step away from it."""

    def factors(self) -> dict[str, nn.Parameter]:
        """What an optimiser moves, by a suffix to the stored tensor's name; such that nothing has changed at first."""
        ...

    def stored(self) -> Tensor:
        """The tensor to write, in its stored dtype. Before the first step it is the old one, bit for bit."""
        ...


AllTrained = dict[str, Trained]
"""By the full name that a tensor is stored under: <linear>.scale, <linear>.codes, <linear>.weight, <norm>.weight."""


class Moved(nn.Module):
    """`base` of any shape in the stored dtype; `factor` float32, a step in units of its root mean square."""

    def __init__(self, base: Tensor) -> None:
        super().__init__()
        self.base: Tensor
        self.register_buffer("base", base)
        self.factor = nn.Parameter(torch.zeros_like(base, dtype=torch.float32))
        self.unit = float(base.float().square().mean().sqrt()) or 1.0

    def factors(self) -> dict[str, nn.Parameter]:
        return {"": self.factor}

    def forward(self) -> Tensor:
        """The value, float32, exactly representable in the stored dtype."""
        return through_storage(self.base.float() + self.unit * self.factor, self.base.dtype)

    @torch.no_grad()
    def stored(self) -> Tensor:
        value: Tensor = self().to(self.base.dtype)
        return value


class Adapter:
    """A linear's weight `base` in the stored dtype, and the LoRA layer that peft put around it."""

    def __init__(self, base: Tensor, layer: Any) -> None:
        self.base, self.layer = base, layer

    def factors(self) -> dict[str, nn.Parameter]:
        return {"lora_A": self.layer.lora_A["default"].weight, "lora_B": self.layer.lora_B["default"].weight}

    @torch.no_grad()
    def stored(self) -> Tensor:
        delta = self.layer.get_delta_weight("default").float().cpu()
        merged: Tensor = (self.base.float() + delta).to(self.base.dtype)
        return merged


def adapted(block: nn.Module, linears: list[str], training: Trainable, seed: int, transposed: bool) -> None:
    """Put LoRA layers around linears of a block, in place. Raises EnvironmentLacksError without peft."""
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=training.rank,
        lora_alpha=2 * training.rank,
        target_modules=linears,
        lora_dropout=0.0,
        fan_in_fan_out=transposed,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, block)


def require_peft() -> None:
    """Raises EnvironmentLacksError where peft cannot be imported."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise EnvironmentLacksError(
            f"recover: train: lora needs peft ({error}); pip install 'compress-models[lora]'"
        ) from None


def factors(trained: AllTrained) -> dict[str, nn.Parameter]:
    """What an optimiser moves, by name."""
    return {
        f"{name}.{suffix}" if suffix else name: parameter
        for name, each in trained.items()
        for suffix, parameter in each.factors().items()
    }


def rate_of_codes(way: float) -> float:
    """What the learning rate is multiplied by for codes."""
    return min(RATE_OF_CODES, WAY_OF_CODES / way)


def rates(trained: AllTrained, way: float) -> dict[str, float]:
    """By the same names, what the learning rate is multiplied by; absent for 1. `way`: the sum of all steps' shares of
    the learning rate."""
    rate = rate_of_codes(way)
    return {name: rate for name in factors(trained) if name.endswith(".codes")}


def stored_values(trained: AllTrained) -> dict[str, Tensor]:
    """The tensors to write, on the CPU."""
    return {name: each.stored().cpu() for name, each in trained.items()}
