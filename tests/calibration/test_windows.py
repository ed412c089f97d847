"""Texts become windows: layouts, start tokens, chat, the ledger, shortfalls, digests, and overlapping text."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from compress.calibration.overlap import LIMIT, NGRAM, SHORTEST, shared_fraction, shared_fraction_of_questions
from compress.calibration.texts import FilesText, documents
from compress.calibration.window_specs import WindowSpec
from compress.calibration.windows import Windows, build_windows
from compress.errors import RecipeError

WORDS = ("the", "cat", "and", "a", "hat", "sat", "on", "Alice", "was", "looking", "at", "queen", "of", "hearts")


@pytest.fixture
def tokenizer(glass):
    return AutoTokenizer.from_pretrained(glass)


@pytest.fixture
def text(tmp_path):
    """text([...]) writes documents (strings, or lists of chat messages) and gives a spec that reads them."""

    def write(rows, column="text", **fields):
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({column: row}) for row in rows) + "\n")
        data = FilesText(paths=("rows.jsonl",), column=column)
        return WindowSpec(data=data, **{"windows": 4, "window_tokens": 16, **fields})

    return write


def sentences(count: int, words: int = 12) -> list[str]:
    return [" ".join(WORDS[(start * 7 + i * 3) % len(WORDS)] for i in range(words)) for start in range(count)]


def test_packed_windows_are_the_documents_joined_by_the_end_token(text, tokenizer, tmp_path):
    rows = sentences(40)

    built = build_windows(text(rows, windows=10), tmp_path, tokenizer, 0, "calibration")

    assert built.ids.shape == (10, 16) and built.mask is None
    stream = built.ids.flatten().tolist()
    ends = [i for i, token in enumerate(stream) if token == tokenizer.eos_token_id]
    encoded = [tokenizer(row, add_special_tokens=False).input_ids for row in rows]
    assert stream[: ends[0]] in encoded and stream[ends[0] + 1 : ends[1]] in encoded


def test_padded_windows_hold_one_document_each_and_mask_the_rest(text, tokenizer, tmp_path):
    rows = [*sentences(3, words=3), *sentences(1, words=60)]

    built = build_windows(text(rows, layout="padded"), tmp_path, tokenizer, 0, "calibration")

    lengths = sorted(min(16, len(tokenizer(row).input_ids)) for row in rows)
    assert sorted(built.mask.sum(1).tolist()) == lengths
    assert built.tokens == sum(lengths) == built.ledger["tokens_obtained"]
    for ids, mask in zip(built.ids, built.mask, strict=True):
        assert mask.tolist() == sorted(mask.tolist(), reverse=True), "padding is on the right"
        assert bool((ids[mask == 0] == tokenizer.pad_token_id).all())
    (event,) = [event for event in built.events if event.kind == "text_truncated"]
    assert event.data["documents"] == 1 == built.ledger["documents_shortened"]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_every_window_begins_with_a_start_token_where_the_tokenizer_sets_one(text, tokenizer, tmp_path, layout):
    from tokenizers.processors import TemplateProcessing

    spec = text(sentences(40), layout=layout)
    assert tokenizer.bos_token_id not in build_windows(spec, tmp_path, tokenizer, 0, "c").ids[:, 0].tolist()

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    ids = build_windows(spec, tmp_path, tokenizer, 0, "c").ids
    assert ids[:, 0].tolist() == [tokenizer.bos_token_id] * 4
    assert not bool((ids[:, 1:] == tokenizer.bos_token_id).any())


def test_chat_goes_through_the_chat_template(text, tokenizer, tmp_path):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chats = [[{"role": "user", "content": s}, {"role": "assistant", "content": "yes"}] for s in sentences(12)]

    built = build_windows(text(chats, column="messages"), tmp_path, tokenizer, 0, "calibration")

    decoded = tokenizer.decode(built.ids.flatten())
    assert "user: " in decoded and "assistant: yes" in decoded


def test_chat_without_a_template_is_refused(text, tokenizer, tmp_path):
    tokenizer.chat_template = None
    chats = [[{"role": "user", "content": "hello"}]] * 30

    with pytest.raises(RecipeError, match=r"calibration: the text is chat, but .* no chat template"):
        build_windows(text(chats, column="messages"), tmp_path, tokenizer, 0, "calibration")


def test_the_ledger_adds_up(text, tokenizer, tmp_path):
    rows = [*sentences(30), "", "   "]

    ledger = build_windows(text(rows, windows=5), tmp_path, tokenizer, 0, "calibration").ledger

    assert ledger["windows_requested"] == ledger["windows_obtained"] == 5
    assert ledger["tokens_requested"] == ledger["tokens_obtained"] == 80
    assert ledger["tokens_read"] == ledger["tokens_obtained"] + ledger["tokens_dropped"]
    assert ledger["tokens_read"] >= 80
    assert 0 < ledger["documents_used"] < ledger["documents"]  # reading stops when the windows are full


def test_fewer_windows_than_asked_is_an_event_with_both_numbers(text, tokenizer, tmp_path):
    built = build_windows(text(sentences(6), windows=500), tmp_path, tokenizer, 0, "calibration")

    (event,) = built.events
    assert event.kind == "calibration_shortfall" and event.where == "calibration"
    assert event.data == {"requested": 500, "obtained": len(built.ids)}


def test_no_window_at_all_is_refused(text, tokenizer, tmp_path):
    with pytest.raises(RecipeError, match=r"gave 1 documents and .* not enough for one window of 512"):
        build_windows(text(["short"], window_tokens=512), tmp_path, tokenizer, 0, "calibration")


def test_the_digest_is_stable_and_sensitive(text, tokenizer, tmp_path):
    rows = sentences(60)

    def digest(seed=0, **fields):
        return build_windows(text(rows, **fields), tmp_path, tokenizer, seed, "calibration").digest

    base = digest()
    assert digest() == base
    others = {digest(seed=1), digest(windows=3), digest(window_tokens=15), digest(layout="padded")}
    rows[0] += " indeed"
    others.add(digest(windows=60))
    assert base not in others and len(others) == 5


def test_a_missing_column_is_answered_with_the_nearest(text, tokenizer, tmp_path):
    spec = text(sentences(3), column="texts")
    wrong = spec.model_copy(update={"data": FilesText(paths=("rows.jsonl",), column="text")})

    with pytest.raises(RecipeError, match=r"no column 'text'\. Did you mean \"texts\""):
        build_windows(wrong, tmp_path, tokenizer, 0, "calibration")


def test_a_file_that_is_not_json_is_refused_with_its_name(text, tokenizer, tmp_path):
    spec = text(sentences(3))
    (tmp_path / "rows.jsonl").write_text("this is not json\n")

    with pytest.raises(RecipeError, match=r"rows\.jsonl"):
        build_windows(spec, tmp_path, tokenizer, 0, "calibration")


def test_plain_text_and_parquet_files_are_read_too(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.txt").write_text("one document\nin two lines\n")
    pq.write_table(pa.table({"text": ["first", "second"]}), tmp_path / "b.parquet")

    (whole,) = documents(FilesText(paths=("a.txt",)), tmp_path)
    assert "one document\nin two lines" in whole
    assert list(documents(FilesText(paths=("b.parquet",)), tmp_path)) == ["first", "second"]


def test_equal_text_shares_everything_and_other_text_nothing():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randint(0, 1000, (4, 64), generator=generator) for _ in range(2))

    assert shared_fraction(one, one) == 1.0
    assert shared_fraction(one, other) == 0.0


def test_questions_of_any_length_are_compared_and_very_short_ones_left_out():
    generator = torch.Generator().manual_seed(2)
    calibration = torch.randint(0, 1000, (4, 64), generator=generator)
    other = torch.randint(1000, 2000, (64,), generator=generator).tolist()
    row = calibration[2].tolist()

    assert shared_fraction_of_questions(calibration, [row[3:40], other[:30]]) == pytest.approx(25 / (25 + 18))
    assert shared_fraction_of_questions(calibration, [row[5 : 5 + NGRAM - 3], other[:9]]) == 0.5
    assert shared_fraction_of_questions(calibration, [row[: SHORTEST - 1]]) == 0.0
    assert shared_fraction_of_questions(calibration, []) == 0.0


def test_one_copied_window_of_eight_is_found_wherever_it_lies():
    generator = torch.Generator().manual_seed(1)
    calibration, evaluation = (torch.randint(0, 1000, (8, 64), generator=generator) for _ in range(2))
    evaluation[3, 5:] = calibration[6, :59]

    share = shared_fraction(calibration, evaluation)

    grams = 64 - NGRAM + 1
    assert share == pytest.approx((59 - NGRAM + 1) / (8 * grams), abs=0.01)
    assert share > LIMIT


def test_batches_are_smaller_where_there_must_be_more_of_them():
    windows = Windows(torch.zeros(20, 8, dtype=torch.int64), None, {"digest": ""})

    assert [len(batch.ids) for batch in windows.batches(16 * 8)] == [16, 4]
    assert [len(batch.ids) for batch in windows.batches(16 * 8, at_least=8)] == [2] * 10
    assert [len(batch.ids) for batch in windows.first(3).batches(16 * 8, at_least=8)] == [1] * 3
