"""The labelled text of the examples: both sources, the splits and the scores."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import _text
import numpy as np
import pytest
import write_docstrings

EXAMPLES = Path(_text.__file__).parent


@pytest.fixture(scope="module")
def default():
    return _text.docstrings()


def dataset(labels, num_classes=None):
    labels = np.array(labels, np.int32)
    classes = tuple(f"c{i}" for i in range(num_classes or labels.max() + 1))
    return _text.Dataset(
        tuple(f"text {i}" for i in range(len(labels))), labels, classes
    )


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ----------------------------------------------------------------------- the docstrings


@pytest.mark.slow
def test_docstrings_written_to_files_are_read_as_they_were(default, tmp_path):
    assert write_docstrings.main([str(tmp_path / "new")]) == 0
    for name, part in zip(("train", "test"), _text.split(default, seed=0), strict=True):
        back = _text.read(tmp_path / "new" / f"{name}.csv", classes=default.classes)
        assert back.texts == part.texts
        np.testing.assert_array_equal(back.labels, part.labels)


@pytest.mark.slow
def test_docstrings_are_about_three_thousand_in_even_classes(default):
    counts = Counter(default.labels.tolist())
    assert default.classes == tuple(_text.AREAS)
    assert 2500 <= len(default) == len(default.labels) <= 3500
    assert default.labels.dtype == np.int32
    assert sorted(counts) == list(range(len(default.classes)))
    assert max(counts.values()) <= _text.MAX_PER_CLASS <= 2 * min(counts.values())


@pytest.mark.slow
def test_docstrings_are_distinct_clean_and_of_bounded_length(default):
    assert len({text.casefold() for text in default.texts}) == len(default)
    for text in default.texts:
        assert text == " ".join(text.split())
        assert _text.MIN_WORDS <= len(text.split()) <= _text.MAX_WORDS
        assert ">>>" not in text


@pytest.mark.slow
def test_docstrings_do_not_name_their_package(default):
    packages = {name.lstrip("_") for names in _text.AREAS.values() for name in names}
    for text in default.texts:
        assert not packages & set(re.findall(r"(?<!\w)\w+(?!\w)", text.casefold()))


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Run the asyncio event loop.", "Run the event loop."),
        ("Like asyncio.sleep(), but\n    longer.", "Like , but longer."),
        ("Email and XML are packages.", "and are packages."),
        ("A subclass of `logging.Handler`.", "A subclass of ."),
        ("Use 'queue' or ``http.client``'s own.", "Use or 's own."),
        ("Say 'open' 'close' or ''.", "Say 'open' 'close' or ''."),
        ("EmailMessage and xmlish stay.", "EmailMessage and xmlish stay."),
        ("Add two numbers_.\n\n>>> add(1, 2)\n3", "Add two numbers_."),
    ],
)
def test_cleaning_removes_package_names_and_doctests(docstring, expected):
    assert _text._clean(docstring) == expected


@pytest.mark.slow
def test_docstrings_do_not_depend_on_hash_seed_or_locale():
    program = (
        "import hashlib, _text; data = _text.docstrings();"
        "print(hashlib.sha256(repr((data.texts, data.labels.tolist()))"
        ".encode()).hexdigest())"
    )
    digests = set()
    for variables in (
        {"PYTHONHASHSEED": "1", "LC_ALL": "C"},
        {"PYTHONHASHSEED": "2", "LC_ALL": "C.UTF-8", "PYTHONOPTIMIZE": "2"},
    ):
        environment = os.environ | variables | {"PYTHONDONTWRITEBYTECODE": "1"}
        digests.add(
            subprocess.run(
                [sys.executable, "-c", program],
                cwd=EXAMPLES,
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
    assert len(digests) == 1


@pytest.mark.slow
def test_docstrings_import_none_of_the_modules_they_come_from():
    program = (
        "import sys, _text; before = set(sys.modules); _text.docstrings();"
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=EXAMPLES,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    new = {name.partition(".")[0] for name in done.stdout.split()}
    assert not new & {"asyncio", "xml", "mailbox", "doctest", "unittest", "wsgiref"}


def write_library(directory, **files):
    for name, content in files.items():
        write(directory / f"{name}.py", content)
    return directory


def test_equal_texts_are_kept_once_or_not_at_all(tmp_path, monkeypatch):
    write_library(
        tmp_path,
        one='"""Only in one of them."""\ndef f():\n  """Twice in the first."""\n'
        'def g():\n  """twice in THE first."""\ndef h():\n  """Too short."""\n'
        'def i():\n  """Said in both modules."""\n',
        two='"""Only in the other."""\nclass C:\n  """Said in both modules."""\n',
    )
    monkeypatch.setattr(_text, "AREAS", {"a": ("one",), "b": ("two",)})
    monkeypatch.setattr(_text.sysconfig, "get_paths", lambda: {"stdlib": tmp_path})
    data = _text.docstrings()
    assert list(zip(data.texts, data.labels.tolist(), strict=True)) == [
        ("Only in one of them.", 0),
        ("Twice in the first.", 0),
        ("Only in the other.", 1),
    ]


def test_large_classes_are_thinned_evenly(tmp_path, monkeypatch):
    functions = (f'def f{i}():\n  """Number {i} of a few."""\n' for i in range(9))
    write_library(tmp_path, one="".join(functions), two='"""Just a single text."""')
    monkeypatch.setattr(_text, "AREAS", {"a": ("one",), "b": ("two",)})
    monkeypatch.setattr(_text, "MAX_PER_CLASS", 3)
    monkeypatch.setattr(_text.sysconfig, "get_paths", lambda: {"stdlib": tmp_path})
    numbers = [text.split()[1] for text in _text.docstrings().texts]
    assert numbers == ["0", "3", "6", "a"]


def test_a_library_without_sources_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(_text.sysconfig, "get_paths", lambda: {"stdlib": tmp_path})
    with pytest.raises(
        ValueError, match="no docstrings of asyncio under .*of your own"
    ):
        _text.docstrings()


# ------------------------------------------------------------------------ files, read


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", '{"text": "a, b", "label": "y"}\n\n{"text": "c", "label": "x"}\n'),
        ("d.csv", 'text,label\n"a, b",y\nc,x\n'),
        ("d.tsv", "label\tother\ttext\ny\t1\ta, b\nx\t2\tc\n"),
        ("D.CSV", '\ufefflabel,text\r\ny,"a, b"\r\nx, c \r\n'),
    ],
)
def test_all_formats_give_the_same_examples(tmp_path, name, content):
    data = _text.read(write(tmp_path / name, content))
    assert data.texts == ("a, b", "c")
    assert data.labels.tolist() == [1, 0] and data.labels.dtype == np.int32
    assert data.classes == ("x", "y")


def test_columns_can_be_chosen(tmp_path):
    path = write(tmp_path / "d.jsonl", '{"q": "a", "k": 1}\n{"q": "b", "k": 0}\n')
    data = _text.read(path, text="q", label="k")
    assert data.texts == ("a", "b") and data.labels.tolist() == [1, 0]


def test_integer_labels_are_sorted_as_numbers(tmp_path):
    path = write(tmp_path / "d.csv", "text,label\na,10\nb,9\nc,-1\n")
    assert _text.read(path).classes == ("-1", "9", "10")


def test_mixed_labels_are_sorted_as_strings(tmp_path):
    path = write(tmp_path / "d.csv", "text,label\na,10\nb,9\nc,x\n")
    assert _text.read(path).classes == ("10", "9", "x")


def test_integers_are_the_same_classes_in_all_formats(tmp_path):
    train = _text.read(write(tmp_path / "a.csv", "text,label\na,0\nb,1\n"))
    path = write(tmp_path / "b.jsonl", '{"text": "c", "label": 1}\n')
    data = _text.read(path, classes=train.classes)
    assert data.labels.tolist() == [1] and data.classes == train.classes


def test_line_separators_of_unicode_do_not_end_a_line(tmp_path):
    texts = ("a\u2028b", "c\x85d")
    rows = (f'{{"text": "{x}", "label": {i}}}\n' for i, x in enumerate(texts))
    assert _text.read(write(tmp_path / "d.jsonl", "".join(rows))).texts == texts
    rows = (f"{x},{i}\n" for i, x in enumerate(texts))
    content = "text,label\n" + "".join(rows)
    assert _text.read(write(tmp_path / "d.csv", content)).texts == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.txt", "a\n", r"d\.txt: expected .*\.jsonl, \.csv, \.tsv, found '\.txt'"),
        ("d", "a\n", "found 'no extension'"),
        ("d.jsonl", "", "no examples"),
        ("d.csv", "", "no examples"),
        ("d.csv", "text,label\n", "no examples"),
        (
            "d.csv",
            "text,kind\na,x\n",
            "d.csv:2: .*'label'.*'text', 'kind'.*--label-col",
        ),
        (
            "d.tsv",
            "body\tlabel\na\tx\n",
            "d.tsv:2: no column 'text'.*'body'.*--text-col",
        ),
        ("d.jsonl", '{"text": "a"}\n', "d.jsonl:1: no column 'label', only 'text';"),
        ("d.jsonl", "{}\n", "d.jsonl:1: no column 'text', only an empty object"),
        (
            "d.jsonl",
            '{"text": "a", "label": 1}\n\n{"text": \n',
            'd.jsonl:3: not valid JSON .*like {"text"',
        ),
        ("d.jsonl", '["a", 1]\n', r"d\.jsonl:1: expected a JSON object, .*\['?\"a"),
        ("d.jsonl", '{"text": 5, "label": 1}\n', "d.jsonl:1: 'text' .*text, found 5"),
        ("d.jsonl", '{"text": "a", "label": true}\n', "d.jsonl:1: 'label'.*found True"),
        ("d.jsonl", '{"text": "a", "label": 0.5}\n', "d.jsonl:1: 'label'.*found 0.5"),
        ("d.jsonl", '{"text": "a", "label": null}\n', "'label'.*found None"),
        (
            "d.jsonl",
            '{"text": " ", "label": 1}\n',
            "d.jsonl:1: the text in 'text' is em",
        ),
        ("d.csv", "text,label\na,x\n,y\n", "d.csv:3: the text in 'text' is empty"),
        ("d.csv", "text,label\na,x\nb,\n", "d.csv:3: the label in 'label' is empty"),
        ("d.csv", "text,label\na,x\nb\n", "d.csv:3: expected 2 fields.* found 1"),
        ("d.csv", "text,label\na, b,x\n", "d.csv:2: expected 2 fields.* found 3"),
        ("d.csv", 'text,label\n"a\nb",x\n"c,y\n', "d.csv:4: .*quotation mark"),
        ("d.tsv", 'text\tlabel\n"a" b\tx\n', "d.tsv:2: .*quotation mark"),
        ("d.csv", b"text,label\na,x\n\xe4,y\n", "d.csv:3: expected UTF-8, .*0xe4"),
        ("d.csv", "text,label\na,x\nb,x\n", "all 2 examples have the label 'x'.*two"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        _text.read(write(tmp_path / name, content))


def test_a_label_that_training_does_not_know_is_refused(tmp_path):
    path = write(tmp_path / "d.csv", "text,label\na,x\nb,z\n")
    with pytest.raises(ValueError, match="d.csv:3: the label 'z' .*'x', 'y'"):
        _text.read(path, classes=("x", "y"))


def test_an_evaluation_file_may_hold_one_class(tmp_path):
    path = write(tmp_path / "d.csv", "text,label\na,y\n")
    data = _text.read(path, classes=("x", "y"))
    assert data.labels.tolist() == [1] and data.classes == ("x", "y")


def test_long_lists_of_names_are_cut_in_messages():
    assert _text._listed("abcde", limit=3) == "'a', 'b', 'c' and 2 more"


# ----------------------------------------------------------------- splits and batches


def test_a_split_holds_every_example_once_and_keeps_proportions():
    data = dataset([0] * 50 + [1] * 20 + [2] * 10)
    train, held_out = _text.split(data, fraction=0.2, seed=3)
    assert Counter(train.texts + held_out.texts) == Counter(data.texts)
    assert np.bincount(held_out.labels).tolist() == [10, 4, 2]
    assert np.bincount(train.labels).tolist() == [40, 16, 8]
    assert train.classes == held_out.classes == data.classes
    lookup = dict(zip(data.texts, data.labels.tolist(), strict=True))
    for part in (train, held_out):
        assert [lookup[text] for text in part.texts] == part.labels.tolist()
        assert list(part.texts) == sorted(part.texts, key=data.texts.index)


def test_a_split_depends_on_its_seed_alone():
    data = dataset([0, 1] * 20)
    first, again, other = (_text.split(data, seed=seed)[1] for seed in (0, 0, 1))
    assert first.texts == again.texts != other.texts


def test_rare_classes_are_in_both_parts_if_they_can_be():
    train, held_out = _text.split(dataset([0] * 10 + [1] * 2 + [2]), fraction=0.1)
    assert np.bincount(train.labels, minlength=3).tolist() == [9, 1, 1]
    assert np.bincount(held_out.labels, minlength=3).tolist() == [1, 1, 0]
    train, held_out = _text.split(dataset([0, 0, 1, 1], 3), fraction=0.99)
    assert np.bincount(train.labels, minlength=3).tolist() == [1, 1, 0]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 20])
def test_a_fraction_outside_of_0_to_1_is_refused(fraction):
    with pytest.raises(ValueError, match=f"between 0 and 1, found {fraction}"):
        _text.split(dataset([0, 0, 1, 1]), fraction=fraction)


def test_data_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="cannot split 2 examples of 2 classes"):
        _text.split(dataset([0, 1]))


def test_batches_are_a_permutation_without_the_incomplete_end():
    found = list(_text.batches(11, 4, seed=0, epoch=0))
    assert [len(batch) for batch in found] == [4, 4]
    assert len(set(np.concatenate(found).tolist())) == 8
    whole = np.concatenate(list(_text.batches(12, 4, seed=0, epoch=0)))
    assert sorted(whole.tolist()) == list(range(12)) != whole.tolist()


def test_batches_depend_on_seed_and_epoch():
    def order(seed, epoch):
        batches = _text.batches(20, 5, seed=seed, epoch=epoch)
        return tuple(np.concatenate(list(batches)).tolist())

    assert order(0, 1) == order(0, 1)
    assert len({order(0, 0), order(0, 1), order(1, 0), order(1, 1)}) == 4


def test_batches_of_like_length_are_a_permutation_with_less_padding():
    lengths = np.random.default_rng(0).integers(1, 60, 100)
    plain, alike = (
        list(_text.batches(100, 8, seed=0, epoch=3, lengths=x)) for x in (None, lengths)
    )
    assert [len(batch) for batch in alike] == [8] * 12
    assert set(np.concatenate(alike)) == set(np.concatenate(plain))
    read = lambda batches: sum(len(b) * lengths[b].max() for b in batches)
    assert read(alike) < 0.7 * read(plain)
    longest = [lengths[batch].max() for batch in alike]
    assert longest != sorted(longest)  # the order does not go by length


@pytest.mark.parametrize("size", [0, 6])
def test_a_batch_size_that_leaves_no_batch_is_refused_at_once(size):
    with pytest.raises(ValueError, match=f"number of examples, 5; found {size}"):
        _text.batches(5, size, seed=0, epoch=0)


# ------------------------------------------------------------------------------ scores


def test_accuracy_and_f1_are_those_computed_by_hand():
    # Class 0: 2 found of 3, 2 of 3 right: F1 2/3. Class 1: 1 found of 2, 1 of 3 right:
    # precision 1/3, recall 1/2, F1 2/5. Class 2: none found of 1: F1 0.
    labels, predictions = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 1]
    accuracy, f1 = _text.accuracy_f1(np.array(labels), np.array(predictions), 3)
    assert accuracy == pytest.approx(3 / 6)
    assert f1 == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)


def test_f1_leaves_out_classes_that_do_not_occur():
    labels = np.array([0, 0, 3])
    assert _text.accuracy_f1(labels, labels, 5) == (1.0, 1.0)
    accuracy, f1 = _text.accuracy_f1(labels, np.array([0, 2, 3]), 5)
    assert accuracy == pytest.approx(2 / 3)
    assert f1 == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_f1_agrees_with_its_definition_on_random_answers():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 6, (2, 200))
    expected = []
    for k in range(6):
        both = np.sum((labels == k) & (predictions == k))
        precision, recall = both / np.sum(predictions == k), both / np.sum(labels == k)
        expected.append(2 * precision * recall / (precision + recall))
    _, f1 = _text.accuracy_f1(labels, predictions, 6)
    assert f1 == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("shapes", [(3, 2), (0, 0)])
def test_scores_of_unlike_or_no_answers_are_refused(shapes):
    labels, predictions = (np.zeros(n, np.int32) for n in shapes)
    with pytest.raises(
        ValueError, match="expected labels and predictions of one shape"
    ):
        _text.accuracy_f1(labels, predictions, 2)


def test_the_majority_answer_is_that_of_training():
    train, held_out = dataset([0, 1, 1], 3), dataset([2, 2, 1, 0], 3)
    assert _text.majority(train, held_out) == pytest.approx(1 / 4)
