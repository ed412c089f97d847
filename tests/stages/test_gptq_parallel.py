"""GPTQ in two processes writes the bytes that one writes; where one process ends, so does the other."""

from __future__ import annotations

import pytest

from compress.calibration.statistics import InputStatistics
from compress.errors import RecipeError
from compress.parallel import PeerEndedError, leads, started_to_follow
from compress.stages import Gptq
from compress.steps.following import follow, leading, together
from tests.processes import in_processes
from tests.tiny import apply_stage, random_model, random_windows, stage_context

WINDOWS = random_windows(count=50)
PADDED = random_windows(count=50, padded=True)
BLOCKS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    random_model("llama", folder, num_hidden_layers=BLOCKS)
    return folder


def _as_a_run(stage, context):
    """What every process of a run does about one stage; gives the leader's events."""
    if started_to_follow():
        return follow()
    with leading(), together(stage, context):
        outcome = stage.apply(context)
    return [event.kind for event in outcome.events]


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("stage", "windows"),
    [
        (Gptq(group_size=32), WINDOWS),
        (Gptq(group_size=32, quality="max", shift_share=0.7), PADDED),
    ],
    ids=["balanced", "token weights, padded"],
)
def test_two_processes_write_the_bytes_that_one_writes(stage, windows, model, tmp_path):
    _, alone = apply_stage(stage, model, tmp_path / "alone", windows)

    context = stage_context(model, tmp_path / "together", windows)
    events, nothing = in_processes(2, lambda: _as_a_run(stage, context), tmp_path)

    assert events == [event.kind for event in alone.events] and nothing is None
    expected, found = _files(tmp_path / "alone"), _files(tmp_path / "together")
    assert len(expected) == BLOCKS + 1
    assert found == expected


def test_two_processes_go_on_where_one_was_stopped(model, tmp_path):
    stage = Gptq(group_size=32)
    apply_stage(stage, model, tmp_path / "alone", WINDOWS)

    def stop(index):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.apply(stage_context(model, tmp_path / "together", WINDOWS, after_block=stop))
    times = (tmp_path / "together" / "block-00000.json").stat().st_mtime_ns
    solved = []

    def work():
        _as_a_run(stage, stage_context(model, tmp_path / "together", WINDOWS, after_block=solved.append))
        return solved

    assert in_processes(2, work, tmp_path) == [[1, 2], []]
    assert (tmp_path / "together" / "block-00000.json").stat().st_mtime_ns == times
    assert _files(tmp_path / "together") == _files(tmp_path / "alone")


def test_an_error_of_the_leader_ends_both_and_the_next_run_goes_on(model, tmp_path):
    def stop(index):
        raise MemoryError("enough")

    stage = Gptq(group_size=32)
    ended = in_processes(
        2, lambda: _as_a_run(stage, stage_context(model, tmp_path / "stage", WINDOWS, after_block=stop)), tmp_path
    )
    assert isinstance(ended[0], MemoryError) and isinstance(ended[1], PeerEndedError)

    _, nothing = in_processes(2, lambda: _as_a_run(stage, stage_context(model, tmp_path / "stage", WINDOWS)), tmp_path)
    assert nothing is None
    apply_stage(stage, model, tmp_path / "alone", WINDOWS)
    assert _files(tmp_path / "stage") == _files(tmp_path / "alone")


def test_a_follower_that_fails_ends_the_leader(model, tmp_path, monkeypatch):
    original = InputStatistics.mismatch

    def failing(statistics):
        if not leads():
            raise MemoryError("enough")
        return original(statistics)

    monkeypatch.setattr(InputStatistics, "mismatch", failing)
    stage = Gptq(group_size=32)
    ended = in_processes(2, lambda: _as_a_run(stage, stage_context(model, tmp_path / "stage", WINDOWS)), tmp_path)

    assert isinstance(ended[0], PeerEndedError) and isinstance(ended[1], MemoryError)


def test_an_error_outside_a_stage_sends_followers_home(tmp_path):
    def work():
        if started_to_follow():
            return follow()
        with leading():
            raise RecipeError("nothing to do")

    ended = in_processes(2, work, tmp_path)

    assert isinstance(ended[0], RecipeError) and ended[1] is None


def test_more_processes_than_batches_is_a_mistake(model, tmp_path):
    context = stage_context(model, tmp_path / "stage", random_windows(count=1))

    ended = in_processes(2, lambda: _as_a_run(Gptq(group_size=32), context), tmp_path)

    assert "1 batches" in str(ended[0]) and isinstance(ended[0], RecipeError) and ended[1] is None
