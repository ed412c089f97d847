"""Task files: every mistake with its line, and which items are drawn."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from compress.evaluation.tasks.items import MOST_MISTAKES, draw, read_items
from compress.evaluation.tasks.spec import Task
from tests.evaluation.tasks.material import CHOICES, CLOZE, write_jsonl

GOOD = {"id": "a", "context": "x", "choices": ["b", "c"], "answer": 1}


def lines_of(path):
    return write_jsonl(path, [{"id": f"i{number}", "context": f"c{number}", "answer": "x"} for number in range(20)])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer": "d"}, "answer 'd' is not among the choices ('b', 'c'), nor an index from 0"),
        ({"answer": 2}, "answer 2 is not among the choices"),
        ({"answer": -1}, "answer -1 is not among the choices"),
        ({"answer": True}, "answer True is not among the choices"),
        ({"answer": None}, "no `answer`"),
        ({"choices": ["b"], "answer": 0}, "1 choices; at least 2 are needed"),
        ({"choices": ["b", "c", "b"]}, "choice 'b' is given twice"),
        ({"choices": ["b", " "]}, "choice 1 is empty"),
        ({"choices": "bc"}, "`choices` is not a list of texts"),
        ({"context": None}, "no `context`"),
        ({"id": ""}, "`id` is not a text or a whole number"),
        ({"target": 1}, "unknown key 'target'"),
    ],
)
def test_a_wrong_line_is_named_with_what_is_wrong(tmp_path, change, says):
    path = write_jsonl(tmp_path / "t.jsonl", [GOOD, {**GOOD, "id": "second", **change}])
    items, mistakes = read_items(path, "multiple_choice")
    assert len(mistakes) == 1 and mistakes[0].startswith(f"{path}:2: {says}")
    assert [item.id for item in items] == ["a"]


def test_all_mistakes_of_a_line_and_of_a_file_are_told_and_many_are_counted(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"id": "a", "choices": ["b"]}] * (MOST_MISTAKES + 5))
    _, mistakes = read_items(path, "multiple_choice")
    assert [says.partition(": ")[2] for says in mistakes[:3]] == [
        "no `context`: it is the text before the answer, maybe empty",
        "1 choices; at least 2 are needed",
        "no `answer`: give the index or the text of the right choice",
    ]
    assert mistakes[-1].endswith(f"and {3 * (MOST_MISTAKES + 5) - MOST_MISTAKES} more mistakes")


def test_duplicate_ids_broken_json_and_empty_files_are_mistakes(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"id": 1, "context": "x", "answer": "y"}\n\n{"id": "1", "context": "z", "answer": "y"}\n{oops\n[]\n'
    )
    _, mistakes = read_items(path, "cloze")
    assert mistakes[0] == f"{path}:3: id '1' was used on line 1 already"
    assert mistakes[1].startswith(f"{path}:4: not JSON") and mistakes[2].startswith(f"{path}:5: not a JSON object")
    path.write_text("\n")
    assert read_items(path, "cloze")[1] == [f"{path}: the file is empty; a task needs items"]
    assert read_items(tmp_path / "none.jsonl", "cloze")[1] == [f"{tmp_path / 'none.jsonl'}: no such file"]


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": 1, "context": "a\u2028b\u0085c", "answer": "y"}\n', encoding="utf-8")
    items, mistakes = read_items(path, "cloze")
    assert not mistakes and items[0].context == "a\u2028b\u0085c"


def test_an_answer_may_be_the_index_or_the_text_of_a_choice(tmp_path):
    items, mistakes = read_items(write_jsonl(tmp_path / "t.jsonl", CHOICES), "multiple_choice")
    assert not mistakes and [item.answer for item in items] == [0, 0, 0, 0, 1, 0]


def test_choices_are_refused_where_the_answer_is_text(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{**CLOZE[0], "choices": ["a", "b"]}])
    assert "`choices` are for multiple_choice" in read_items(path, "generation")[1][0]


def test_more_items_always_include_fewer_and_examples_are_never_asked(tmp_path):
    path = lines_of(tmp_path / "t.jsonl")
    asked = []
    for count in (5, 9, 17):
        drawn, mistakes = draw(Task(name="t", file=path, type="cloze", items=count, few_shot=3), seed=4)
        assert not mistakes and len(drawn.asked) == count and drawn.available == 17
        asked.append({item.id for item in drawn.asked})
        assert len(drawn.examples) == 3 and not asked[-1] & {item.id for item in drawn.examples}
    assert asked[0] < asked[1] < asked[2]
    other, _ = draw(Task(name="t", file=path, type="cloze", items=5, few_shot=3), seed=5)
    assert {item.id for item in other.asked} != asked[0]


def test_limits_above_what_there_is_are_mistakes(tmp_path):
    path = lines_of(tmp_path / "t.jsonl")
    _, mistakes = draw(Task(name="t", file=path, type="cloze", items=18, max_items=30, few_shot=3), seed=0)
    assert mistakes == [
        f"{path}: items is 18, the file has 17 beside 3 shown as examples",
        f"{path}: max_items is 30, the file has 17 beside 3 shown as examples",
    ]


def test_examples_of_a_file_come_in_its_order_and_must_not_be_asked(tmp_path):
    path = lines_of(tmp_path / "t.jsonl")
    shots = write_jsonl(tmp_path / "s.jsonl", [{"id": n, "context": f"other {n}", "answer": "x"} for n in range(3)])
    spec = Task(name="t", file=path, type="cloze", few_shot=2, few_shot_file=shots)
    drawn, mistakes = draw(spec, seed=0)
    assert not mistakes and [item.context for item in drawn.examples] == ["other 0", "other 1"]
    assert len(drawn.asked) == 20
    write_jsonl(shots, [{"id": 0, "context": "c7", "answer": "x"}])
    assert [says.partition(": ")[2] for says in draw(spec, seed=0)[1]] == [
        "few_shot asks for 2 examples, the file has 1",
        "an example is also asked: 'c7'",
    ]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "give either `task:`"),
        ({"task": "x", "file": "f", "name": "n"}, "give either `task:`"),
        ({"file": "f"}, "a local task needs a `name:`"),
        ({"task": "x", "type": "cloze"}, "`type` is for local tasks"),
        ({"file": "f", "name": "n", "stop": ["x"]}, "`stop` is for type: generation"),
        ({"file": "f", "name": "n", "type": "cloze", "normalise": True}, "only choices have lengths"),
        ({"file": "f", "name": "n", "few_shot_file": "g"}, "say how many examples"),
        ({"file": "f", "name": "n", "max_items": 4}, "`max_items` needs `items`"),
        ({"file": "f", "name": "n", "items": 5, "max_items": 4}, "must not be less"),
        ({"file": "f", "name": "n", "type": "generation", "stop": [""]}, "an empty `stop`"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, says):
    with pytest.raises(ValidationError, match=says):
        Task(**fields)


def test_measures_follow_the_type():
    assert Task(name="n", file="f", normalise=True).measures == ["task.n.accuracy", "task.n.accuracy_norm"]
    assert Task(name="n", file="f", type="cloze").measures == ["task.n.accuracy", "task.n.nll"]
    assert Task(task="arc:easy").measures == ["task.arc_easy.accuracy"]


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "arc_easy", "few_shot": 5},
        {"file": "f", "name": "n", "normalise": True, "items": 5, "max_items": 9},
        {"file": "f", "name": "n", "type": "cloze", "few_shot": 1, "few_shot_file": "g"},
        {"file": "f", "name": "n", "type": "generation", "stop": ["x"], "max_new_tokens": 3},
    ],
)
def test_a_task_written_out_with_its_defaults_is_the_same_task(fields):
    spec = Task(**fields)
    assert Task(**spec.model_dump(mode="json", exclude_none=True)) == spec
