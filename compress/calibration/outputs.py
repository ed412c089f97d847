"""What the model's output depends on, from one backward pass over a few batches.

g_t is the gradient of the model's loss, on labels sampled from itself (`backward`), with respect to a linear's output
at token t, summed over all tokens that this output has an effect on. To second order an error dy_t of the outputs adds
1/2 (g_t . dy_t)^2 nats to the divergence from the model. Three things are made of it:

lambda_r = E_t[g_tr^2]      how much output r of a linear matters: what `rounding_cost` goes by

w_t                         how much token t matters to what queries, keys and values are made from it: |g_t|^2 over its
                            mean, averaged over the linears. Later tokens read the keys and values of earlier ones, and
                            those of a few, at the beginning of a text above all, are read by all of them: in
                            SmolLM2-135M the gradients of values come from 33 tokens of 16,384 in effect. An H in which
                            every token counts alike hardly sees them. So the inputs of queries, keys and values get

                                H = (1 - SHARE) E[x x^T] + SHARE E_w[x x^T]

                            the second over the tokens that gradients are known for. For other linears w_t is mostly
                            noise, and they are left alone (docs/benchmarks/ablation.md).

G = E_t[g_t g_t^T]          how outputs of a linear matter together (`quantization.row_feedback`): those of each head
                            of queries, keys and values, all of other linears as far as tokens and disk allow;
                            over two halves of the text, so that one can judge the other

Weights that follow the loss are GuidedQuant's (arXiv 2505.07004), G is the output side of K-FAC (arXiv 1503.05671).

Several processes (`compress.parallel`) take every n-th of its batches each; sums are float64.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress import parallel
from compress.architecture import Architecture, dimensions_of
from compress.calibration.backward import on_output_gradients, walk_backward
from compress.calibration.windows import Windows
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Batch, Skeleton
from compress.events import Event, Progress
from compress.files import atomic_path
from compress.memory.measure import release
from compress.quantization.row_feedback import Band, bands_of

SHARE = 0.5
"""Of H, what goes by the weights of tokens."""
ATTENTION = "attention_input"
"""The group of linears that queries, keys and values come from."""
HALVES = 2
TOKENS_PER_ROW = 8
"""With fewer tokens a row, G of a whole linear is left out."""
SUMS_BYTES = 512 * 2**20
"""Bytes that the sums of G take on disk at most, those of heads not counted: groups are left out from the last on."""
ROW_FEEDBACK_ORDER = ("attention_output", "mlp_output", "mlp_input")


def evenly(windows: int, window_tokens: int, tokens: int) -> list[int]:
    """Numbers of the windows, at least one, that have about so many tokens between them, spread over all; where there
    are several, one is of the last sixteenth, among those that refinements are judged by."""
    wanted = max(1, min(windows, round(tokens / window_tokens)))
    found = [int((number + 0.5) * windows / wanted) for number in range(wanted)]
    return found if wanted == 1 else sorted({*found[:-1], max(found[-1], windows - 1 - windows // 16)})


def starts_of(batches: list[Batch]) -> list[int]:
    """The number of the window that each of all batches begins with."""
    return [0, *accumulate(len(batch.ids) for batch in batches)][:-1]


def moment_shapes(
    architecture: Architecture, shapes: dict[str, tuple[int, int]], blocks: int, head_dim: int, tokens: int
) -> dict[str, tuple[int, int]]:
    """(matrices, their size) of the G that `tokens` tokens are enough for, by the linear's name in a block.

    `shapes`: (rows, columns) of linears by name in a block.
    """
    groups = {group.name: group.linears for group in architecture.groups}
    found = {name: (shapes[name][0] // head_dim, head_dim) for name in groups.get(ATTENTION, ())}
    left = SUMS_BYTES
    for names in (groups.get(group, ()) for group in ROW_FEEDBACK_ORDER):
        rows = [shapes[name][0] for name in names]
        size = sum(blocks * HALVES * each**2 * 8 for each in rows)
        if rows and max(rows) * TOKENS_PER_ROW <= tokens and size <= left:
            found |= {name: (1, each) for name, each in zip(names, rows, strict=True)}
            left -= size
    return found


@dataclass(frozen=True)
class Outputs:
    """What one backward pass told, in a folder, a file a block. Names are full names of linears."""

    folder: Path
    architecture: Architecture

    @cached_property
    def _text(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = load_file(self.folder / _TEXT)
        return found

    @cached_property
    def _windows(self) -> dict[int, int]:
        """Of each window that gradients are known for, by its number among all: its place in the files."""
        return {int(number): place for place, number in enumerate(self._text["windows"])}

    def token_weights(self, block: int, first: int, batch: Batch) -> Tensor:
        """What each token counts for in the H of the group `ATTENTION`, with mean 1 over all windows: (windows, tokens)
        of a batch that begins with window `first`."""
        weights = torch.full(batch.ids.shape, 1.0 - SHARE)
        known = [(row, self._windows.get(first + row)) for row in range(len(weights))]
        for row, place in known:
            if place is not None:
                with safe_open(_file(self.folder, block), "pt") as file:
                    weights[row] += SHARE / float(self._text["share"]) * file.get_slice(_ENERGIES)[place]
        return weights

    def sensitivities(self, name: str) -> Tensor:
        """lambda (rows,) float32."""
        found = self._of(name, "sensitivities")
        assert found is not None
        return found

    def moments(self, name: str) -> Tensor | None:
        """G (halves, matrices, size, size) float32 of runs of rows, one after another; None where it is not known."""
        return self._of(name, "moments")

    def _of(self, name: str, what: str) -> Tensor | None:
        block = self.architecture.block_index(name)
        assert block is not None
        key = f"{what}/{name}"
        with safe_open(_file(self.folder, block), "pt") as file:
            found: Tensor | None = file.get_tensor(key) if key in file.keys() else None  # noqa: SIM118
        return found

    def usable(self, names: list[str]) -> bool:
        """Whether the gradients of these linears were finite."""
        return all(bool(torch.isfinite(self.sensitivities(name)).all()) for name in names)


_TEXT, _ENERGIES = "text.safetensors", "energies"
"""The file that is written last, of the windows; and the key of w_t (picked windows, tokens) in a block's."""


def _file(folder: Path, block: int) -> Path:
    return folder / f"block-{block:05d}.safetensors"


def row_bands(outputs: Outputs, block: str, names: Sequence[str], device: torch.device) -> dict[str, list[Band]]:
    """What feedback along the rows of linears of a block goes by; none where G of one of them is not known."""
    found: dict[str, list[Band]] = {}
    for name in names:
        moments = outputs.moments(f"{block}.{name}")
        if moments is not None:
            found[name] = bands_of(moments.to(device))
    return found if len(found) == len(names) else {}


def skipped(block: str) -> Event:
    """That gradients of a block were not usable."""
    message = "every token of attention's inputs counts alike, and rows make up for none: gradients not finite"
    return Event("outputs_skipped", block, message)


def outputs_of(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    windows: Windows,
    tokens: int,
    tokens_at_once: int,
    seed: int,
    progress: Progress,
    folder: Path,
    products: torch.dtype | None = None,
) -> Outputs:
    """What about `tokens` tokens of the calibration text tell; linears multiply in `products`. `folder` is filled by
    the leader; what a killed run left there whole is read instead."""
    found = Outputs(folder, skeleton.architecture)
    if parallel.from_leader((folder / _TEXT).is_file()):
        return found
    picked = evenly(len(windows.ids), windows.ids.shape[1], tokens)
    known = windows.rows(torch.tensor(picked)).tokens
    # Batches are cut before they are dealt out: labels are drawn for each.
    rows = max(1, tokens_at_once // windows.ids.shape[1])
    turns = parallel.share([list(range(len(picked)))[start : start + rows] for start in range(0, len(picked), rows)])
    batches = [_batch(windows, [picked[place] for place in turn]) for turn in turns]
    own = folder / f"sums-{parallel.rank()}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    sums = _Sums(skeleton, known, len(picked) == 1, own)
    with progress.task("what the output depends on", skeleton.block_count) as advance:

        def keep(block: int) -> None:
            sums.keep(block)
            advance(f"block {block + 1}/{skeleton.block_count}")

        sums.places, sums.masks = turns, [batch.mask for batch in batches]
        seeds = [seed * 1_000_003 + turn[0] for turn in turns]
        if batches:
            walk_backward(skeleton, checkpoint, batches, seeds, sums.watch, products, keep, own)
    for block in range(skeleton.block_count):
        tensors = sums.means(block, turns)
        if parallel.leads():
            with atomic_path(_file(folder, block)) as temporary:
                save_file(tensors, temporary)
    shutil.rmtree(own, ignore_errors=True)
    if parallel.leads():
        share = torch.tensor(known / windows.tokens, dtype=torch.float64)
        with atomic_path(folder / _TEXT) as temporary:
            save_file({"windows": torch.tensor(picked), "share": share}, temporary)
    # Nobody reads before the leader has written.
    parallel.from_leader(None)
    # 230 MiB of SmolLM2-135M's pass stay in the heap otherwise, beside what the walk after it holds.
    release()
    return found


def _batch(windows: Windows, numbers: list[int]) -> Batch:
    return Batch(windows.ids[numbers], None if windows.mask is None else windows.mask[numbers])


class _Sums:
    """Sums over the tokens of a backward pass, of one block at a time on the device that it runs on, and of all blocks
    in a folder."""

    def __init__(self, skeleton: Skeleton, tokens: int, alone: bool, folder: Path) -> None:
        """`tokens`: of all processes; `alone`: they are one window's."""
        arch = skeleton.architecture
        self._arch, self._device, self._tokens, self._alone = arch, skeleton.device, tokens, alone
        self._folder = folder
        self._attention = next((group.linears for group in arch.groups if group.name == ATTENTION), ())
        first = arch.block_name(0) + "."
        every = skeleton.linear_shapes()
        self._shapes = {name.removeprefix(first): shape for name, shape in every.items() if name.startswith(first)}
        head = dimensions_of(skeleton.config).head_dim
        self._runs = moment_shapes(arch, self._shapes, skeleton.block_count, head, tokens)
        self._sums = self._zeros()
        self._energies: dict[int, dict[int, dict[str, Tensor]]] = {}
        """|g_t|^2 (tokens,) by block, by place of a window among those picked, by linear of attention."""
        self.places: list[list[int]] = []
        """Of each window of each batch that is going through: its place among those picked."""
        self.masks: list[Tensor | None] = []

    def _zeros(self) -> dict[str, Tensor]:
        """A block's sums, float64: of g^2 (rows,) and of g g^T (halves, runs, size, size)."""
        shapes: dict[str, tuple[int, ...]] = {
            f"sensitivities/{name}": (rows,) for name, (rows, _) in self._shapes.items()
        }
        shapes |= {f"moments/{name}": (HALVES, runs, size, size) for name, (runs, size) in self._runs.items()}
        return {key: torch.zeros(shape, dtype=torch.float64, device=self._device) for key, shape in shapes.items()}

    @contextmanager
    def watch(self, index: int, number: int, block: nn.Module) -> Iterator[None]:
        places, mask = self.places[number], self.masks[number]
        later = torch.tensor([place % HALVES for place in places], device=self._device).bool()

        def take(name: str, gradient: Tensor) -> None:
            gradient = gradient.float()
            if mask is not None:
                gradient = gradient * mask.to(gradient).unsqueeze(-1)
            squares = gradient.square()
            self._sums[f"sensitivities/{name}"] += squares.sum((0, 1), dtype=torch.float64)
            if name in self._attention:
                for place, energies in zip(places, squares.sum(-1).cpu(), strict=True):
                    self._energies.setdefault(index, {}).setdefault(place, {})[name] = energies
            if name in self._runs:
                # Every other window is of the other half; of a single window the second half of its tokens.
                middle = gradient.shape[1] // 2
                halves = (gradient[~later], gradient[later])
                if self._alone:
                    halves = (gradient[:, :middle], gradient[:, middle:])
                for half, rows in enumerate(halves):
                    runs = rows.reshape(-1, *self._runs[name]).transpose(0, 1)
                    self._sums[f"moments/{name}"][half] += runs.transpose(1, 2) @ runs

        with on_output_gradients(block, self._arch.linears, take):
            yield

    def keep(self, block: int) -> None:
        """All batches have come back through a block: its sums go to the folder."""
        sums, self._sums = self._sums, self._zeros()
        save_file({key: each.cpu() for key, each in sums.items()}, _file(self._folder, block))

    def means(self, block: int, turns: list[list[int]]) -> dict[str, Tensor]:
        """What `Outputs` keeps of a block, over the tokens of all processes. `turns`: places of the windows of each of
        this process's batches."""
        path, prefix = _file(self._folder, block), self._arch.block_name(block)
        found = {}
        kept = load_file(path) if path.is_file() else {key: each.cpu() for key, each in self._zeros().items()}
        for key, whole in kept.items():
            whole = whole.to(self._device)
            parallel.add_up(whole)
            what, name = key.split("/", 1)
            found[f"{what}/{prefix}.{name}"] = (
                (whole / self._tokens * (HALVES if what == "moments" else 1)).float().cpu()
            )
        path.unlink(missing_ok=True)
        own = [torch.stack([self._weights(block, place, found) for place in turn]) for turn in turns]
        return {**found, _ENERGIES: torch.cat(parallel.in_order(own))}

    def _weights(self, block: int, place: int, means: dict[str, Tensor]) -> Tensor:
        """w_t (tokens,) of a window, with mean 1 over all that were picked."""
        prefix = self._arch.block_name(block)
        parts = [
            each / (float(means[f"sensitivities/{prefix}.{name}"].sum()) or 1.0)
            for name, each in self._energies[block][place].items()
        ]
        return torch.stack(parts).mean(0)
