"""How far a linear should be moved to follow the source: as far as tokens that the move was not computed from agree.

Notation, as in `quantization.target_shift`: x~, r~ the source's input and residual stream, x, r those here,
D = E[(x~ - x) x^T], R = E[(r~ - r) x^T], H = E[x x^T]. Full steps are A = W D H^-1 and B = R H^-1, from most of the
tokens. They fit noise as well: R is small and H^-1 large, and every linear fits a little more of it. On tokens held out
(H', D', R') the best multiples of both are

    min_{a, b} E'|W x~ + (r~ - r) - (W + a A + b B) x|^2
        [<A H', A>  <A H', B>] [a]   [<A, W D' + R'>]
        [<A H', B>  <B H', B>] [b] = [<B, W D' + R'>]

each kept between 0 and 1.

Example with one column and one row: W = 1, A = 0 and B = 0.2 from most tokens; held out, r~ - r = 0.1 x. Then b = 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.quantization.target_shift import Mismatch, Shift


@dataclass(frozen=True)
class Followed:
    """The target (rows, columns) float32, and the shares of both steps that were taken."""

    target: Tensor
    input_share: float
    residual_share: float


def followed(weight: Tensor, full: Shift, held_out: Mismatch) -> Followed:
    """`weight` (rows, columns) float32 moved by the shares of `full` (both shares 1) that `held_out` asks for."""
    wanted = weight.double() @ held_out.cross
    if held_out.residual is not None and full.offset is not None:
        wanted += held_out.residual
    steps = [weight @ full.factor, full.offset]
    shares = _shares([step for step in steps if step is not None], wanted, held_out.hessian)
    target = weight.clone()
    for step, share in zip(steps, shares, strict=False):
        if step is not None:
            target.add_(step, alpha=share)
    return Followed(target, shares[0], shares[1] if full.offset is not None else 0.0)


def _shares(steps: list[Tensor], wanted: Tensor, hessian: Tensor) -> list[float]:
    """The best multiple of each step, between 0 and 1; one alone where the other is best left out."""
    moved = [step.double() @ hessian for step in steps]
    table = torch.stack([torch.stack([(left * right.double()).sum() for right in steps]) for left in moved]).cpu()
    gains = torch.stack([(step.double() * wanted).sum() for step in steps]).cpu()
    if not bool(torch.isfinite(table).all() and torch.isfinite(gains).all()):
        return [0.0] * len(steps)
    best, lowest = [0.0] * len(steps), 0.0
    for used in ([0], [1], [0, 1]) if len(steps) == 2 else ([0],):
        part = table[used][:, used]
        if float(part.diagonal().min()) <= 0:
            continue
        found = torch.linalg.lstsq(part, gains[used].unsqueeze(1)).solution.squeeze(1).clamp(0, 1)
        value = float(found @ part @ found - 2 * found @ gains[used])
        if value < lowest:
            lowest, best = value, [0.0] * len(steps)
            for at, share in zip(used, found.tolist(), strict=True):
                best[at] = share
    return best
