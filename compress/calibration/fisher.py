"""How much an error of a linear's weights costs the model's output.

g is the gradient of the model's loss, on labels sampled from itself, with respect to a linear's output, summed over all
tokens that the output has an effect on. To second order an error dy of the outputs at token t adds 1/2 (g_t . dy)^2 to
the divergence from the model, so that rounding a weight matrix W to Q costs, in nats a token,

    1/2 tr[G (W - Q) H (W - Q)^T],     G = E_t[g_t g_t^T],     H the mean outer product of the linear's inputs,

if gradients do not depend on the inputs. Where only lambda_r = G_rr is known, outputs are taken not to matter together.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounding_cost(difference: Tensor, hessian: Tensor, sensitivity: Tensor, moments: Tensor | None = None) -> float:
    """In nats a token. difference (rows, columns), hessian (columns, columns) float32, sensitivity lambda (rows,);
    `moments`: G of runs of rows (halves of the text, runs, size, size), in place of lambda."""
    spread = difference @ hessian
    if moments is None:
        errors = (spread * difference).sum(1).clamp_min(0)
        return 0.5 * float(torch.dot(errors.double(), sensitivity.to(errors.device).double()))
    runs = moments.mean(0).to(difference.device)
    rows = difference.view(*runs.shape[:2], -1)
    return max(0.0, 0.5 * float(((runs @ rows) * spread.view_as(rows)).sum(dtype=torch.float64)))
