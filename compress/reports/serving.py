"""Memory when served: KV cache over context and concurrency as a table, total memory as a plot beside GPU sizes.

The total is weights as loaded plus KV cache. Activations and the runtime's own memory come on top of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from compress.reports.report import Memory
from compress.reports.tables import Table
from compress.reports.words import size

GPU_GB = (8, 12, 16, 24, 48, 80, 141)
"""Memory of common GPUs as they are sold; a GB of those is 2**30 bytes, or within two hundredths of it."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 300, 80, 86, 12, 40
NOTE = (
    "Weights as loaded plus KV cache, as predicted, from the model's shape; activations and the runtime's own memory "
    "come on top."
)


def weights_bytes(memory: Memory) -> float | None:
    """Weights as loaded: measured, else predicted, else as stored."""
    known = (memory.resident.measured, memory.resident.predicted, memory.stored.measured, memory.stored.predicted)
    return next((value for value in known if value), None)


def cache_table(memory: Memory) -> Table:
    """KV cache: a row for each context, a column for each concurrency."""
    found = {(point.context, point.concurrency): point.kv_cache_bytes for point in memory.serving}
    contexts, columns = _axes(memory)
    rows = [(f"{context:,}", *(size(found.get((context, many))) for many in columns)) for context in contexts]
    headers = ("Context, tokens", *(f"{many:,} at once" for many in columns))
    return Table("KV cache, predicted", headers, "r" + "r" * len(columns), rows)


def _axes(memory: Memory) -> tuple[list[int], list[int]]:
    contexts = sorted({point.context for point in memory.serving})
    return contexts, sorted({point.concurrency for point in memory.serving})


def sentence(memory: Memory) -> str:
    """The smallest common GPU that holds the load of the recipe, and what the longest context takes."""
    weights, cache = weights_bytes(memory), memory.kv_cache.measured or memory.kv_cache.predicted
    if weights is None or cache is None:
        return ""
    said = f"{memory.context:,} tokens x {memory.concurrency} take {size(weights + cache)}: {_gpu(weights + cache)}."
    contexts, columns = _axes(memory)
    if contexts:
        most = next(each for each in memory.serving if (each.context, each.concurrency) == (contexts[-1], columns[-1]))
        total = weights + most.kv_cache_bytes
        said += f" {most.context:,} tokens x {most.concurrency} take {size(total)}: {_gpu(total)}."
    return said


def _gpu(total: float) -> str:
    fits = next((gigabytes for gigabytes in GPU_GB if total <= gigabytes << 30), None)
    return f"the smallest common GPU above that has {fits} GB" if fits else f"more than {GPU_GB[-1]} GB, one GPU's most"


def plot(memory: Memory) -> Markup:
    """Total serving memory over context, a line for each concurrency, both axes logarithmic; GPU sizes as levels, the
    load that was measured as a ring. Empty without a predicted cache."""
    weights = weights_bytes(memory)
    contexts, columns = _axes(memory)
    if weights is None or len(contexts) < 2:
        return Markup("")
    totals = {(each.context, each.concurrency): weights + each.kv_cache_bytes for each in memory.serving}
    low, high = min(totals.values()), max(totals.values())
    gpus = _gpus(low, high)
    low, high = min(low, *(gpu << 30 for gpu in gpus)) / 1.15, max(high, *(gpu << 30 for gpu in gpus)) * 1.15

    def x(context: float) -> float:
        share = math.log(context / contexts[0]) / math.log(contexts[-1] / contexts[0])
        return round(LEFT + (WIDTH - LEFT - RIGHT) * min(1.0, max(0.0, share)), 1)

    def y(total: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * math.log(total / low) / math.log(high / low), 1)

    levels = [_level(y(gpu << 30), f"{gpu} GB", LEFT + 4 + 62 * (at % 2)) for at, gpu in enumerate(gpus)]
    shapes = [_tick(x(context), context) for context in contexts]
    shapes += [_amount(y(amount), amount) for amount in _amounts(low, high)]
    shapes += levels
    taken: list[float] = []
    for at, many in reversed(list(enumerate(columns))):
        points = [(context, totals[context, many]) for context in contexts if (context, many) in totals]
        line = " ".join(f"{x(context)},{y(total)}" for context, total in points)
        title = "; ".join(f"{context:,} tokens {size(total)}" for context, total in points)
        shapes.append(
            Markup('<polyline class="line{}" points="{}"><title>{} at once: {}</title></polyline>').format(
                at % 6, line, many, title
            )
        )
        end = _free(y(points[-1][1]), taken)
        shapes.append(
            Markup('<text class="tick" x="{}" y="{}">{} at once</text>').format(WIDTH - RIGHT + 6, end + 3.5, many)
        )
    shapes += _measured(memory, x, y)
    return Markup('<svg class="serving" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, "serving memory over context, with memory of common GPUs", Markup("").join(shapes)
    )


def _gpus(low: float, high: float) -> list[int]:
    """Those that tell something here: between the least and the most, and the next on either side."""
    inside = [gpu for gpu in GPU_GB if low <= gpu << 30 <= high]
    above = [gpu for gpu in GPU_GB if gpu << 30 > high][:1]
    below = [gpu for gpu in GPU_GB if gpu << 30 < low][-1:]
    return [*below, *inside, *above]


def _free(y: float, taken: list[float], least: float = 12) -> float:
    """The nearest height above or at `y` where no earlier label is; lines come from the highest down."""
    while any(abs(y - other) < least for other in taken):
        y += 1
    taken.append(y)
    return y


def _measured(memory: Memory, x: Callable[[float], float], y: Callable[[float], float]) -> list[Markup]:
    weights, cache = memory.resident.measured, memory.kv_cache.measured
    contexts, _ = _axes(memory)
    if weights is None or cache is None or not contexts[0] <= memory.context <= contexts[-1]:
        return []
    title = f"measured: {memory.context:,} tokens x {memory.concurrency}, {size(weights + cache)}"
    return [
        Markup('<circle class="ring" cx="{}" cy="{}" r="6"><title>{}</title></circle>').format(
            x(memory.context), y(weights + cache), title
        )
    ]


def _level(y: float, text: str, x: float) -> Markup:
    return Markup(
        '<line class="gpu" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="tick gpu-name" x="{}" y="{}">{}</text>'
    ).format(LEFT, WIDTH - RIGHT, y, y, x, y + 3.5, text)


def _tick(x: float, context: int) -> Markup:
    words = f"{context >> 10}k" if context >= 1024 and context % 1024 == 0 else f"{context:,}"
    return Markup(
        '<line class="grid" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>'
        '<text class="tick" x="{0}" y="{3}" text-anchor="middle">{4}</text>'
    ).format(x, TOP, HEIGHT - BOTTOM, HEIGHT - BOTTOM + 15, words)


def _amounts(low: float, high: float) -> Sequence[float]:
    """Whole powers of four of a MiB inside, thinned to at most seven."""
    powers = [power for power in range(0, 64, 2) if low <= 2.0**power <= high]
    step = 1 + (len(powers) - 1) // 7
    return [2.0**power for power in powers[::step]]


def _amount(y: float, amount: float) -> Markup:
    return Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
        LEFT - 6, y + 3.5, size(amount).replace(".00", "").replace(".0 ", " ")
    )
