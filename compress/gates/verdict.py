"""From the judgements of all gates to one verdict.

Two kinds of mistakes, two rules:

- *Passing* needs every gate. A bad model must slip through all of them, so each may use its whole alpha
  (intersection-union test; Berger, Technometrics 24, 1982).
- *Failing* needs only one. With ten gates at 5 %, a model that sits exactly at its margins would fail one of them four
  times in ten. So the p-values of failing are adjusted by Holm over the run's non-inferiority gates; one that fails
  only unadjusted is inconclusive. Advisory gates decide nothing and are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from compress.gates.base import Judgement, Verdict


def adjusted(judgements: list[Judgement]) -> list[Judgement]:
    """The judgements with failures that are not significant among so many tests turned to inconclusive."""
    from statsmodels.stats.multitest import multipletests

    tests = [index for index, each in enumerate(judgements) if each.p_beyond is not None and each.tier != "advisory"]
    if len(tests) < 2:
        return judgements
    _, values, _, _ = multipletests([judgements[index].p_beyond for index in tests], method="holm")
    result = list(judgements)
    for index, value in zip(tests, values, strict=True):
        judgement = judgements[index]
        assert judgement.alpha is not None
        if judgement.verdict == "failed" and value >= judgement.alpha:
            why = f" Among {len(tests)} such gates this is not significant (Holm: p = {value:.3g}): inconclusive."
            result[index] = replace(judgement, verdict="inconclusive", sentence=judgement.sentence + why)
    return result


def overall(judgements: Iterable[Judgement]) -> Verdict:
    """Failed if a critical gate failed, or none judged; inconclusive if a critical one is, or a supporting one failed,
    which a person must decide about; else passed. Advisory gates only inform."""
    listed = list(judgements)
    critical = {each.verdict for each in listed if each.tier == "critical"}
    supporting = {each.verdict for each in listed if each.tier == "supporting"}
    if not critical or "failed" in critical:
        return "failed"
    return "inconclusive" if "inconclusive" in critical or "failed" in supporting else "passed"
