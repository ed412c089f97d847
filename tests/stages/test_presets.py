"""A quality that takes more than one stage is written out, once."""

from __future__ import annotations

import pytest

from compress.stages import Gptq, RoundToNearest
from compress.stages.presets import forget_quality, written_out
from compress.stages.recover import Recover


@pytest.mark.parametrize(
    ("bits", "train"),
    [(2, "codes"), (3, "codes"), (4, "scales+norms"), (8, "scales+norms"), ("planned", "scales+norms")],
)
def test_max_is_followed_by_recover_which_moves_codes_where_bits_are_few(bits, train):
    before, solved, after = RoundToNearest(ignore=("*.mlp.*",)), Gptq(quality="max", bits=bits), RoundToNearest()

    assert written_out((before, solved, after)) == (before, solved, Recover(train=train), after)


@pytest.mark.parametrize("stages", [(Gptq(),), (Gptq(quality="fast"),), (Gptq(quality="max"), Recover(epochs=9))])
def test_nothing_is_added_to_other_qualities_or_beside_a_recover_stage(stages):
    assert written_out(stages) == stages


def test_writing_out_twice_adds_nothing():
    once = written_out((Gptq(quality="max"),))

    assert written_out(once) == once


@pytest.mark.parametrize("stored", ["fast", "balanced", "max"])
@pytest.mark.parametrize("wanted", ["fast", "balanced", "max"])
def test_another_quality_on_a_resolved_stage_is_that_quality(stored, wanted):
    resolved = Gptq(quality=stored, bits=3).model_dump(mode="json")
    resolved["quality"] = wanted
    forget_quality(resolved)

    assert Gptq.model_validate(resolved) == Gptq(quality=wanted, bits=3)
