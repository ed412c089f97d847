"""Serving memory: the table has what was predicted, the plot puts it at its height among GPUs."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from compress.reports.report import Memory, PredictedMeasured, ServingPoint
from compress.reports.serving import cache_table, plot, sentence

from .example import memory

GIB = 1 << 30


def served(weights: float, a_token: int, contexts: tuple[int, ...] = (1024, 2048, 4096)) -> Memory:
    points = [
        ServingPoint(context=context, concurrency=many, kv_cache_bytes=a_token * context * many)
        for context in contexts
        for many in (1, 8)
    ]
    cache = PredictedMeasured(predicted=a_token * 2048, measured=a_token * 2048)
    return memory().model_copy(
        update={
            "resident": PredictedMeasured(predicted=weights, measured=weights),
            "kv_cache": cache,
            "concurrency": 1,
            "serving": points,
            "max_context": contexts[-1],
        }
    )


def test_the_table_has_a_row_for_each_context_and_a_column_for_each_concurrency() -> None:
    table = cache_table(served(GIB, 1 << 20))
    assert table.headers == ("Context, tokens", "1 at once", "8 at once")
    assert table.rows[1] == ("2,048", "2.00 GiB", "16.00 GiB")


@pytest.mark.parametrize(
    ("weights", "says"),
    [(5 * GIB, "7.00 GiB: the smallest common GPU above that has 8 GB"), (200 * GIB, "more than 141 GB")],
)
def test_the_sentence_names_the_gpu_that_holds_the_load(weights: float, says: str) -> None:
    assert says in sentence(served(weights, 1 << 20))


def heights(picture: str) -> dict[str, float]:
    """{label of a GPU: height of its line}."""
    root = ElementTree.fromstring(picture)
    lines = [float(line.get("y1", "")) for line in root.findall("line[@class='gpu']")]
    names = [text.text or "" for text in root.findall("text[@class='tick gpu-name']")]
    return dict(zip(names, lines, strict=True))


def test_lines_rise_with_context_and_gpus_lie_at_their_height() -> None:
    picture = plot(served(6 * GIB, 1 << 21))
    root = ElementTree.fromstring(picture)
    lines = [
        [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]
        for line in root.findall("polyline")
    ]
    assert len(lines) == 2
    for line in lines:
        assert [y for _, y in line] == sorted((y for _, y in line), reverse=True)
    found = heights(picture)
    # 1,024 tokens at once take 8 GiB exactly: the lower line starts where the 8 GB level is.
    assert lines[1][0][1] == pytest.approx(found["8 GB"], abs=0.11)
    assert found["8 GB"] > found["12 GB"] > found["80 GB"]
    ring = root.find("circle[@class='ring']")
    assert ring is not None and float(ring.get("cy", "")) == pytest.approx(lines[1][1][1], abs=0.11)


def test_a_small_model_is_shown_below_the_smallest_gpu_only() -> None:
    assert list(heights(plot(served(1 << 20, 64)))) == ["8 GB"]


def test_a_report_from_before_the_table_has_neither() -> None:
    assert plot(memory()) == "" and not cache_table(memory()).rows
