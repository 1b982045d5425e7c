"""Documents into rows, packed or not; and files into dialogues and pairs."""

import csv
import json

import _dialogues
import _pairs
import _rows
import _signatures
import numpy as np
import pytest


def document(size, at="", counted=None):
    ids = np.arange(size, dtype=np.int32) + 100 * size
    counted = np.arange(size) > 1 if counted is None else counted
    return _rows.Document(ids, counted, at)


def taken_apart(rows):
    """The documents that are in the rows."""
    return sorted(
        rows.ids[r][rows.segments[r] == n].tolist()
        for r in range(len(rows))
        for n in range(1, rows.segments[r].max() + 1)
    )


def test_packed_rows_hold_every_document_whole():
    sizes = [7, 3, 5, 5, 2, 8, 1, 4]
    documents = [document(n) for n in sizes]
    rows = _rows.pack(documents, 8, pad=-1)
    assert taken_apart(rows) == sorted(d.ids.tolist() for d in documents)
    assert len(rows) == 5  # 35 tokens in rows of 8: no fewer would do
    assert ((rows.segments == 0) == (rows.ids == -1)).all()
    assert rows.counted.sum() == sum(d.counted.sum() for d in documents)
    assert not rows.counted[rows.segments == 0].any()


def test_unpacked_rows_have_one_document_each():
    rows = _rows.one_each([document(3), document(5)], 6, pad=0)
    assert rows.segments.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]


def test_too_long_documents_are_cut_dropped_or_refused():
    long, short = document(9, "file:3"), document(4)
    late = document(9, counted=np.arange(9) > 6)
    cut = _rows.fit([long, short, late], 6, "truncate")
    assert [len(d.ids) for d in cut.documents] == [6, 4]
    assert (cut.truncated, cut.dropped, cut.emptied) == (1, 0, 1)
    assert "1 cut off" in cut.told(6) and "nothing of the answer" in cut.told(6)
    gone = _rows.fit([long, short], 6, "drop")
    assert (len(gone.documents), gone.dropped) == (1, 1)
    with pytest.raises(ValueError, match="file:3: 9 tokens, and rows have 6"):
        _rows.fit([long], 6, "keep")
    with pytest.raises(ValueError, match="none of 1 examples fits"):
        _rows.fit([late], 6, "truncate")
    with pytest.raises(ValueError, match="too_long='cut'"):
        _rows.fit([short], 6, "cut")


# --- files ---------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHATS = [
    {"messages": [USER, ANSWER]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"instruction": "q", "output": "a"},
    {"instruction": "q", "input": "", "output": "a"},
    {"prompt": "q", "completion": "a"},
    {"prompt": [USER], "completion": [ANSWER]},
]


@pytest.mark.parametrize("row", CHATS)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_all_forms_of_a_dialogue_are_read(tmp_path, row, suffix):
    path = tmp_path / f"data.{suffix}"
    path.write_text(json.dumps([row]) if suffix == "json" else json.dumps(row) + "\n\n")
    (found,) = _dialogues.dialogues(path)
    assert list(found.messages) == [USER, ANSWER]
    assert found.question == [USER] and found.answer == "a"


def test_tables_are_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"instruction": "q, r", "input": "x\ny", "output": "a"}]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    for name in ("data.csv", "data.parquet"):
        (found,) = _dialogues.dialogues(tmp_path / name)
        assert found.messages[0]["content"] == "q, r\n\nx\ny", name


def test_plain_text_is_no_chat(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "once"}')
    (found,) = _dialogues.dialogues(path)
    assert found.text == "once" and found.messages == ()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": "b"},
        {
            "chosen": [USER, ANSWER],
            "rejected": [USER, {"role": "assistant", "content": "b"}],
        },
    ],
)
def test_all_forms_of_a_pair_are_read(tmp_path, row):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row))
    (found,) = _dialogues.pairs(path)
    assert (found.question, found.chosen, found.rejected) == ((USER,), "a", "b")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"text": "a"}\n{"text": ', r"data\.jsonl:2: not valid JSON"),
        ('{"instruction": "q", "output": " "}', r"data\.jsonl:1: 'output' is empty"),
        ('{"instruction": "q"}', "no field 'output'"),
        ('{"instruction": "q", "output": 3}', "'output' should be a text, found 3"),
        ('{"question": "q"}', "expected 'messages', 'conversations'"),
        ('{"messages": []}', "expected a list of messages"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "ends with a message by"),
        ('{"messages": [{"role": "bot", "content": "q"}]}', "message 0 is by 'bot'"),
        ("[1]", "expected an object"),
        ("", "has no examples"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(tmp_path, text, says):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        _dialogues.dialogues(path)


def test_malformed_json_is_named_by_its_line(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[\n{"text": "a"},\n{"text": }\n]')
    with pytest.raises(ValueError, match=r"data\.json:3: not valid JSON"):
        _dialogues.dialogues(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            '{"prompt": "q", "chosen": "a", "rejected": "a"}',
            "both answers are the same",
        ),
        ('{"prompt": "q", "chosen": "a"}', "a pair has 'chosen' and 'rejected'"),
        (
            '{"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", '
            '"content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}',
            "differ before their last message",
        ),
    ],
)
def test_pairs_that_cannot_be_used_are_refused(tmp_path, text, says):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        _dialogues.pairs(path)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("{instruction} {context}", "unknown field 'context'"),
        ("{input}", "leaves the {instruction} out"),
        ("{instruction", "double a brace"),
    ],
)
def test_a_prompt_with_an_unknown_field_is_refused(prompt, says):
    with pytest.raises(ValueError, match=says):
        _dialogues.check_prompt(prompt)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("x")
    with pytest.raises(ValueError, match=r"ends in \.json, \.jsonl"):
        _dialogues.dialogues(path)


# --- the default data ----------------------------------------------------------------


def test_a_rule_tells_the_default_pairs_apart():
    pairs = _pairs.default()
    assert len(pairs) > 1000
    assert all(_signatures.follows(p.chosen) for p in pairs)
    assert not any(_signatures.follows(p.rejected) for p in pairs)
    longer = [len(p.rejected) > len(p.chosen) for p in pairs]
    assert 0.5 < sum(longer) / len(longer) < 0.75  # length does not tell
