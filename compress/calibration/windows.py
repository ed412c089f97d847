"""Documents -> token windows, with a ledger of what was asked for, obtained and dropped.

packed   documents in a seeded order, joined by the end-of-text token, cut into windows of equal length
padded   one document a window, cut or padded on the right; padding is masked and never enters a statistic

Where the tokenizer puts a start token before a text, every window starts with one (Gemma needs it). Chat messages go
through the tokenizer's chat template. The digest covers the token ids themselves.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.calibration.texts import (
    Descriptor,
    Document,
    SelfGenerated,
    documents,
    interpreter,
)
from compress.calibration.window_specs import WindowSpec
from compress.checkpoints.skeleton import Batch
from compress.errors import RecipeError
from compress.events import Event

_OF_ALL = {"windows_obtained", "tokens_obtained", "window_tokens"}
"""Of a ledger, what is not a sum over its texts, or is counted anew."""
CHARACTERS_PER_TOKEN = 6
"""More than any common tokenizer packs into a token on average."""


@dataclass(frozen=True)
class Windows:
    """ids (windows, tokens) int64; mask the same shape, 1 for real tokens, or None if nothing is padded."""

    ids: Tensor
    mask: Tensor | None
    ledger: dict[str, Any]
    events: tuple[Event, ...] = field(default=())

    @property
    def digest(self) -> str:
        return str(self.ledger["digest"])

    @property
    def tokens(self) -> int:
        return int(self.ids.numel() if self.mask is None else self.mask.sum())

    def first(self, count: int) -> Windows:
        """The first `count` windows, for a quick look."""
        return Windows(self.ids[:count], None if self.mask is None else self.mask[:count], self.ledger)

    def shortened(self, tokens: int) -> Windows:
        """Every window, its first `tokens` tokens."""
        return Windows(self.ids[:, :tokens], None if self.mask is None else self.mask[:, :tokens], self.ledger)

    def part(self, start: int, stop: int) -> Windows:
        """Windows start..stop-1, with a ledger and a digest of their own; events stay with the whole."""
        ids, mask = self.ids[start:stop], None if self.mask is None else self.mask[start:stop]
        tokens = int(ids.numel() if mask is None else mask.sum())
        own = {"windows_obtained": len(ids), "tokens_obtained": tokens, "digest": digest_of(ids, mask)}
        return Windows(ids, mask, {**self.ledger, **own})

    def rows(self, numbers: Tensor) -> Windows:
        """Some of the windows, by number."""
        mask = None if self.mask is None else self.mask[numbers]
        return Windows(self.ids[numbers], mask, self.ledger, self.events)

    def apart(self, count: int) -> tuple[Windows, Windows]:
        """All but the last `count` windows, and those: what a stage computes from, and what it measures choices on.

        Raises RecipeError where nothing would be left to compute from.
        """
        total = len(self.ids)
        if total <= count:
            raise RecipeError(
                f"calibration.windows: {total}, of which tuning_windows keeps {count} apart; take more calibration "
                "windows, or fewer tuning_windows"
            )
        return self.part(0, total - count), self.part(total - count, total)

    def distinct(self, where: str) -> Windows:
        """Without windows that repeat an earlier one, and an event where there were any: a copy is no evidence."""
        seen: dict[bytes, int] = {}
        for row, ids in enumerate(self.ids):
            real = ids if self.mask is None else ids[self.mask[row].bool()]
            seen.setdefault(real.numpy().tobytes(), row)
        if len(seen) == len(self.ids):
            return self
        rows = torch.tensor(sorted(seen.values()))
        kept = Windows(self.ids[rows], None if self.mask is None else self.mask[rows], self.ledger)
        message = f"{len(self.ids) - len(rows)} of {len(self.ids)} windows repeat an earlier one and were left out"
        event = Event("windows_repeated", where, message, {"windows": len(self.ids) - len(rows)})
        return replace(kept.part(0, len(rows)), events=(*self.events, event))

    def with_more(self, pieces: Sequence[Windows]) -> Windows:
        """These and further windows of the same text, with a ledger and a digest of their own."""
        ids = torch.cat([self.ids, *(piece.ids for piece in pieces)])
        masks = [windows.mask for windows in (self, *pieces)]
        mask = None if self.mask is None else torch.cat([mask for mask in masks if mask is not None])
        return replace(Windows(ids, mask, self.ledger).part(0, len(ids)), events=self.events)

    def mixed_with(self, other: Windows, seed: int) -> Windows:
        """These and windows of another text, shuffled, so that any part of them holds both. The ledger tells of both
        texts; its own numbers are those of all."""
        ids = torch.cat([self.ids, other.ids])
        mask = None
        if self.mask is not None or other.mask is not None:
            masks = [torch.ones_like(each.ids) if each.mask is None else each.mask for each in (self, other)]
            mask = torch.cat(masks)
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        whole = Windows(ids[order], None if mask is None else mask[order], self.ledger).part(0, len(ids))
        both = self.ledger, other.ledger
        own = {key: value for key, value in whole.ledger.items() if key not in ("source", "licence")}
        counted = {key for key in own if all(isinstance(each.get(key), int) for each in both)} - _OF_ALL
        sums = {key: self.ledger[key] + other.ledger[key] for key in counted}
        names = " + ".join(str(each["name"]) for each in both)
        ledger = {**own, **sums, "name": names, "texts": list(both)}
        return replace(whole, ledger=ledger, events=(*self.events, *other.events))

    def batches(self, tokens_at_once: int, at_least: int = 1) -> list[Batch]:
        """Cut into batches of about `tokens_at_once` tokens, or smaller ones to have `at_least` so many."""
        size = max(1, min(tokens_at_once // self.ids.shape[1], len(self.ids) // at_least))
        return [
            Batch(self.ids[start : start + size], None if self.mask is None else self.mask[start : start + size])
            for start in range(0, len(self.ids), size)
        ]


HELD_OUT = 0.125
"""Share of calibration windows to which no weight is fitted, so that training can be judged by them."""


def kept_out(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the windows that weights may be fitted to, and of those kept out (at least one of each, count >= 2),
    both ascending. The same seed keeps the same windows out, and more of them for a larger share."""
    generator = torch.Generator().manual_seed(seed * 1_000_003)
    order = torch.randperm(count, generator=generator)
    cut = min(count - 1, max(1, round(share * count)))
    return order[cut:].sort().values, order[:cut].sort().values


def build_windows(spec: WindowSpec, base: Path, tokenizer: Any, seed: int, where: str) -> Windows:
    """Windows of a text. `where` names the recipe key for messages. Raises RecipeError if not one window results."""
    descriptor, folder = spec.descriptor(base)
    if isinstance(descriptor.source, SelfGenerated):
        raise AssertionError("self-generated windows are sampled by calibration.self_generated")
    tally = _Tally()
    texts = _texts(documents(descriptor.source, folder), tokenizer, tally, where)
    if getattr(descriptor.source, "streaming", False):
        # Rows arrive one by one and cannot all be fetched: shuffle among a few times more than is needed.
        texts = _until(texts, spec.windows * spec.window_tokens * 3 * CHARACTERS_PER_TOKEN)
    ordered = list(texts)
    random.Random(seed).shuffle(ordered)
    encoded = _encode(ordered, tokenizer, spec, tally)
    cut = _packed if spec.layout == "packed" else _padded
    ids, mask = cut(encoded, spec, tokenizer, tally)
    if not len(ids):
        raise RecipeError(
            f"{where}: the text {descriptor.name!r} gave {tally.documents} documents and {tally.tokens} tokens, "
            f"not enough for one window of {spec.window_tokens}. Use a longer text or a smaller window_tokens."
        )
    return assemble(ids, mask, spec, descriptor, tally.as_dict(), where)


def assemble(
    ids: Tensor, mask: Tensor | None, spec: WindowSpec, descriptor: Descriptor, tally: dict[str, Any], where: str
) -> Windows:
    """Windows with their ledger; a shortfall against `spec` becomes an event."""
    obtained = int(ids.numel() if mask is None else mask.sum())
    ledger = {
        "name": descriptor.name,
        "licence": descriptor.licence,
        "source": descriptor.source.model_dump(mode="json"),
        "layout": spec.layout,
        "windows_requested": spec.windows,
        "windows_obtained": len(ids),
        "window_tokens": spec.window_tokens,
        "tokens_requested": spec.windows * spec.window_tokens,
        "tokens_obtained": obtained,
        **tally,
        "python": interpreter(),
        "digest": digest_of(ids, mask),
    }
    events = []
    if len(ids) < spec.windows:
        events.append(
            Event(
                "calibration_shortfall",
                where,
                f"{descriptor.name}: {len(ids)} windows of {spec.window_tokens} tokens obtained, {spec.windows} asked",
                {"requested": spec.windows, "obtained": len(ids)},
            )
        )
    if tally.get("documents_shortened"):
        events.append(
            Event(
                "text_truncated",
                where,
                f"{descriptor.name}: {tally['documents_shortened']} documents cut to {spec.window_tokens} tokens",
                {"documents": tally["documents_shortened"], "tokens_dropped": tally["tokens_dropped"]},
            )
        )
    return Windows(ids, mask, ledger, tuple(events))


def digest_of(ids: Tensor, mask: Tensor | None) -> str:
    """sha256 over shape, token ids and mask."""
    digest = hashlib.sha256(str(tuple(ids.shape)).encode())
    digest.update(ids.to(torch.int64).contiguous().numpy().tobytes())
    if mask is not None:
        digest.update(mask.to(torch.int8).contiguous().numpy().tobytes())
    return digest.hexdigest()


def starts_with_bos(tokenizer: Any) -> int | None:
    """The start token, if the tokenizer puts one before a text by itself."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return None
    encoded = tokenizer("a")["input_ids"]
    return int(bos) if encoded and encoded[0] == bos else None


@dataclass
class _Tally:
    documents: int = 0
    documents_empty: int = 0
    documents_shortened: int = 0
    documents_used: int = 0
    tokens: int = 0
    tokens_dropped: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "documents_empty": self.documents_empty,
            "documents_used": self.documents_used,
            "documents_shortened": self.documents_shortened,
            "tokens_read": self.tokens,
            "tokens_dropped": self.tokens_dropped,
        }


def _texts(source: Iterator[Document], tokenizer: Any, tally: _Tally, where: str) -> Iterator[str]:
    for document in source:
        tally.documents += 1
        text = document if isinstance(document, str) else _chat(document, tokenizer, where)
        if text.strip():
            yield text
        else:
            tally.documents_empty += 1


def _chat(messages: list[dict[str, Any]], tokenizer: Any, where: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise RecipeError(f"{where}: the text is chat, but the model's tokenizer has no chat template.")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:
        raise RecipeError(f"{where}: the chat template refuses a conversation ({error}).") from error


def _until(texts: Iterator[str], characters: int) -> Iterator[str]:
    """Texts until they have about `characters` characters together."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _encode(texts: list[str], tokenizer: Any, spec: WindowSpec, tally: _Tally) -> list[list[int]]:
    """Token ids of as many texts as the windows need, without special tokens of the tokenizer's own."""
    bos = starts_with_bos(tokenizer)
    encoded: list[list[int]] = []
    total = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if bos is not None and ids[:1] == [bos]:
            ids = ids[1:]  # a chat template wrote it; every window gets one anyway
        if ids:
            encoded.append(ids)
            total += len(ids) + 1
        enough = len(encoded) >= spec.windows if spec.layout == "padded" else total >= spec.windows * spec.window_tokens
        if enough:
            break
    tally.documents_used = len(encoded)
    return encoded


def _packed(encoded: list[list[int]], spec: WindowSpec, tokenizer: Any, tally: _Tally) -> tuple[Tensor, Tensor | None]:
    bos, eos = starts_with_bos(tokenizer), getattr(tokenizer, "eos_token_id", None)
    body = spec.window_tokens - (bos is not None)
    stream: list[int] = []
    for ids in encoded:
        stream += ids
        if eos is not None:
            stream.append(int(eos))
    tally.tokens = len(stream)
    count = min(spec.windows, len(stream) // body)
    tally.tokens_dropped = len(stream) - count * body
    windows = torch.tensor(stream[: count * body], dtype=torch.int64).view(count, body)
    if bos is not None:
        windows = torch.cat([torch.full((count, 1), bos), windows], dim=1)
    return windows, None


def _padded(encoded: list[list[int]], spec: WindowSpec, tokenizer: Any, tally: _Tally) -> tuple[Tensor, Tensor | None]:
    bos = starts_with_bos(tokenizer)
    start = [] if bos is None else [bos]
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = pad if pad is not None else getattr(tokenizer, "eos_token_id", None) or 0
    tally.tokens = sum(len(ids) for ids in encoded)
    rows, masks = [], []
    for ids in encoded[: spec.windows]:
        room = spec.window_tokens - len(start)
        tally.documents_shortened += len(ids) > room
        row = start + ids[:room]
        blank = spec.window_tokens - len(row)
        rows.append(row + [pad] * blank)
        masks.append([1] * len(row) + [0] * blank)
    used = sum(sum(mask) for mask in masks)
    tally.tokens_dropped = tally.tokens - used
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(masks, dtype=torch.int64)
