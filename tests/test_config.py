"""Recipes: unknown keys are refused with the nearest known one."""

import copy
import inspect
import pickle
import re
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from every_method import needed

import jpeft
from jpeft.transform import METHODS

RECIPE = """
[[peft]]
method = "lora"
rank = 8
alpha = 16
where = ["attention", ".*/up/kernel"]
rank_pattern = {".*query.*" = 4}

[[peft]]
method = "full"
where = "head/.*"

[train]
learning_rate = 1e-3
"""


def test_a_recipe_is_a_chain(tmp_path):
    file = tmp_path / "lora.toml"
    file.write_text(RECIPE)
    transform, train = jpeft.config.read(file)
    assert (
        transform
        == jpeft.from_config(file)
        == jpeft.chain(
            jpeft.lora(
                8,
                16,
                where=["attention", ".*/up/kernel"],
                rank_pattern={".*query.*": 4},
            ),
            jpeft.full("head/.*"),
        )
    )
    assert train == {"learning_rate": 1e-3}
    again = tmp_path / "again.toml"
    again.write_text(jpeft.config.to_toml(transform, train))
    assert jpeft.config.read(again) == (transform, train)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"method": "lora", "rnk": 8}, ["unknown key 'rnk'", "did you mean 'rank'"]),
        ({"method": "lroa", "rank": 8}, ["unknown method 'lroa'", "'lora'"]),
        ({"method": "lora"}, ["lacks ['rank'"]),
        ({"rank": 8}, ["unknown key 'rank'"]),
        ({"pfet": []}, ["unknown key 'pfet'", "did you mean 'peft'"]),
        ({"peft": []}, ["no [[peft]] table"]),
        ({"peft": {"method": "lora", "rank": 2}, "train": [{}]}, ["write [train]"]),
        ({"method": "chain", "transform": []}, ["the one key 'transforms'"]),
        ({"method": "lora", "rank": 8, "alpha": 1, "init": "xavier"}, ["'gaussian'"]),
        ([], ["expected a dict or a path"]),
    ],
)
def test_bad_configurations(config, parts):
    with pytest.raises(ValueError) as error:
        jpeft.from_config(config)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: jpeft.lora(8, alhpa=16),
            r"lora: unknown argument 'alhpa'; did you mean 'alpha'\? Known: alpha, .*",
        ),
        (lambda: jpeft.lora(alpha=16), r"lora: the call lacks \['rank'\]"),
        (
            lambda: jpeft.lora(8, 16, "attention"),
            "lora: 3 positional arguments, expected at most 2: rank, alpha; write .*",
        ),
        (lambda: jpeft.ia3("a"), "ia3: 1 positional arguments, expected none; .*"),
        (
            lambda: jpeft.lora(8, rank=8),
            "lora: 'rank' is given twice, by position and by name",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, message):
    with pytest.raises(TypeError) as error:
        call()
    assert re.fullmatch(message, str(error.value))


def test_a_call_is_the_configuration_of_the_same_arguments():
    for name, cls in METHODS.items():
        if name == "chain":
            continue
        given = needed(cls)
        made = getattr(jpeft, name)(*given.values())
        assert made == getattr(jpeft, name)(**given)
        data = {k: getattr(v, "to_config", lambda v=v: v)() for k, v in given.items()}
        assert made == jpeft.from_config({"method": name, **data})
        assert made == jpeft.from_config(made.to_config())
        assert copy.deepcopy(made) == pickle.loads(pickle.dumps(made)) == made
        parameters = inspect.signature(getattr(jpeft, name)).parameters.values()
        kinds = [p.kind for p in parameters]
        assert kinds == sorted(kinds)
        assert {p.name for p in parameters if p.default is p.empty} == set(given)


def test_what_a_configuration_leaves_out():
    """The marks of leaves in checkpoints are made of it."""
    assert jpeft.vera().to_config() == {"method": "vera", "rank": 256}
    assert jpeft.quantize(block_size=64).to_config() == {"method": "quantize"}
    assert jpeft.quantize("q4_0").to_config() == {
        "method": "quantize",
        "format": "q4_0",
        "block_size": 32,
    }


def test_bad_files(tmp_path):
    (tmp_path / "lora.toml").write_text("[[peft]\n")
    with pytest.raises(ValueError, match="not TOML"):
        jpeft.from_config(tmp_path / "lora.toml")
    with pytest.raises(FileNotFoundError, match="nearest: .*lora.toml"):
        jpeft.from_config(tmp_path / "lroa.toml")


def test_a_recipe_that_comes_with_jpeft_is_called_by_its_name(tmp_path, monkeypatch):
    folder = Path(__file__).parents[1] / "configs"
    monkeypatch.chdir(tmp_path)
    for name in ("lora", "sft/qlora", "language/dpo"):
        file = folder / f"{name}.toml"
        assert jpeft.from_config(name) == jpeft.from_config(file)
        assert jpeft.config.read(name) == jpeft.config.read(file)
    for name, near in (("lroa", "lora"), ("sft/qlra", "sft/qlora"), ("", "adalora")):
        with pytest.raises(FileNotFoundError) as error:
            jpeft.from_config(name)
        assert f"no recipe {name!r}" in str(error.value)
        assert repr(near) in str(error.value)
    # A file of the name goes first, a folder is none, and a Path is never a name.
    Path("lora").write_text(RECIPE)
    assert jpeft.from_config("lora") == jpeft.from_config(Path("lora"))
    Path("dora").mkdir()
    assert jpeft.from_config("dora") == jpeft.from_config(folder / "dora.toml")
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        jpeft.from_config(Path("vera"))


def test_a_function_in_where_has_no_configuration():
    transform = jpeft.lora(rank=2, where=lambda path, leaf: True)
    with pytest.raises(ValueError, match="is a Python function"):
        transform.to_config()
    assert "callable" in transform.describe()["where"]


# --- files that are damaged, or written wrong ----------------------------------------

HEAD = '[[peft]]\nmethod = "lora"\nrank = 2\n'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            HEAD + 'rank_stabilized = "false"',
            ["rank_stabilized='false': expected True"],
        ),
        (HEAD + "alpha = inf", ["lora: alpha=inf: expected a number above 0"]),
        (HEAD + "alpha = 1e400", ["lora: alpha=inf"]),
        (HEAD + "alpha = nan", ["lora: alpha=nan"]),
        (HEAD + "dropout = 1", ["lora: dropout=1: expected a rate from 0"]),
        (HEAD + "rank_pattern = 3", ["lora: rank_pattern=3: expected {regular"]),
        (HEAD + "alpha_pattern = [4]", ["lora: alpha_pattern=[4]: expected {regular"]),
        (HEAD + "where = {a = 1}", ["lora: where={'a': 1}: expected one of"]),
        ('[[peft]]\nmethod = ["lora"]', ["unknown method ['lora']"]),
        ("[[peft]]\nmethod = {lora = 1}", ["unknown method {'lora': 1}"]),
        ("peft = 3", ["write [[peft]], a table a transform, not 3"]),
        ('peft = "lora"', ["write [[peft]], a table a transform, not 'lora'"]),
        ("peft = [3]", ["needs a key 'method'"]),
        ("peft = []", ["the file has no [[peft]] table"]),
        (
            '[[peft]]\nmethod = "chain"\ntransforms = 3',
            ["chain: transforms=3: expected"],
        ),
        (
            '[[peft]]\nmethod = "gated"\ntransform = {method = "ia3"}',
            ["gated: expected jpeft.lora(...)"],
        ),
        (
            HEAD + "[train]\nrate = [1.0, nan]",
            ["train.rate[1] = nan: expected a number"],
        ),
        (HEAD + f"alpha = {'9' * 5000}", ["not TOML"]),
        (
            HEAD + f"alpha = 0x{'f' * 5000}",
            ["lora: alpha=", "thousands of digits"],
        ),
        (HEAD + f"where = {'[' * 5000}", ["not TOML"]),
        ("\ufeff" + HEAD, ["not TOML"]),
        (".".join("a" * 99999) + " = 1", ["not TOML: a key of 99999 parts in line 1"]),
        (HEAD + f"x = {{{'.'.join(['a', *['q'] * 9999])} = 1}}", ["of 10000 parts in"]),
    ],
)
def test_what_is_written_wrong_is_named_with_its_file(tmp_path, text, parts):
    file = tmp_path / "a.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        jpeft.from_config(file)
    for part in [str(file), *parts]:
        assert part in str(error.value)


def test_transforms_nested_too_deeply_are_refused(tmp_path):
    config = {"method": "lora", "rank": 2}
    for _ in range(600):
        config = {"method": "chain", "transforms": [config]}
    with pytest.raises(
        ValueError, match="nested too deeply; write one after the other"
    ):
        jpeft.from_config(config)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_that_is_not_utf_8_is_named(tmp_path, encoding):
    file = tmp_path / "a.toml"
    file.write_text(HEAD + "# Zeichen: \u00e4", encoding=encoding)
    with pytest.raises(ValueError, match="a.toml: not UTF-8.*save it again as UTF-8"):
        jpeft.from_config(file)
    file.write_text(file.read_text(encoding=encoding), encoding="utf-8")  # the remedy
    assert jpeft.from_config(file) == jpeft.lora(2)


ROUND = {
    "one in a chain": jpeft.chain(jpeft.lora(2)),
    "a chain in a chain": jpeft.chain(jpeft.chain(jpeft.lora(2), jpeft.quantize())),
    "a chain of one inside": jpeft.chain(jpeft.chain(jpeft.quantize()), jpeft.lora(2)),
    "no bias of the model's": jpeft.bitfit(where=None, add="a"),
    "nothing of attention": jpeft.ia3(where=()),
    "odd characters": jpeft.lora(2, where='a\t"\\d\x07\x7f\u00e4\U0001f600\r\nb'),
    "odd keys": jpeft.lora(2, rank_pattern={"": 3, 'a."b': 4, "\t": 5}),
    "a gate": jpeft.gated(jpeft.lora(2), replace_scale=True),
    "a dtype by another name": jpeft.lora(2, dtype="f4"),
}


@pytest.mark.parametrize("name", ROUND)
def test_what_is_written_is_what_is_read(tmp_path, name):
    transform, train = ROUND[name], {"steps": np.int64(3), "rate": np.inf, "x\n": [1]}
    file = tmp_path / "a.toml"
    file.write_text(jpeft.config.to_toml(transform, train), encoding="utf-8")
    again, read = jpeft.config.read(file)
    assert again == transform and type(again) is type(transform)
    assert again.origin() == transform.origin()
    assert read == train
    assert jpeft.from_config(transform.to_config()) == transform


def test_a_recipe_with_nan_is_not_written():
    with pytest.raises(ValueError, match="train.rate = nan: expected a number"):
        jpeft.config.to_toml(jpeft.lora(2), {"rate": float("nan")})


def test_equal_transforms_have_one_mark():
    a, b = jpeft.lora(2, alpha=8.0), jpeft.lora(2, alpha=8)
    assert a == b and a.origin() == b.origin()


# --- recipes changed at random -------------------------------------------------------

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
VALUES = (
    *(
        '"false"',
        "true",
        "inf",
        "-inf",
        "nan",
        "1e400",
        "-1",
        "0",
        "1.0",
        "0.999999999",
    ),
    *('"2"', "[2]", "{a = 1}", '""', '"("', '["a", 3]', "1979-05-27", "[[1]]", "{}"),
    *('"lora"', '"int8"', '"attention"', "9" * 30, "4e38", "1e-50", '"\\u0000"'),
)
SWITCHES = {
    *("rank_stabilized", "decompose_both", "structured", "one_hot", "replace_scale"),
    *("double", "gate", "late"),
}
WHOLE = {
    *("rank", "length", "prefix_length", "bottleneck", "width", "hidden", "tasks"),
    *("heads", "steps", "factor"),
}
RATES = {"dropout"}
NUMBERS = {"alpha", "std", "d_initial", "reduction", "temperature", "low", "high"}
PATHS = {"where", "exclude", "add", "feedforward", "projections", "attention", "mlp"}


def changed(text, draw):
    """The bytes of a recipe with one thing changed."""
    lines = text.splitlines()
    kind = draw.integers(6)
    at = [k for k, x in enumerate(lines) if " = " in x and not x.startswith("#")]
    k = int(draw.choice(at))
    if kind < 2:  # another value
        lines[k] = lines[k].split(" = ")[0] + " = " + str(draw.choice(VALUES))
    elif kind == 2:  # another key
        key = str(draw.choice(sorted(SWITCHES | WHOLE | NUMBERS | RATES | PATHS)))
        lines[k] = key + " = " + str(draw.choice(VALUES))
    elif kind == 3:  # a line goes, or comes twice
        lines[k : k + 1] = [lines[k]] * int(draw.choice([0, 2]))
    data = bytearray("\n".join(lines).encode())
    if kind == 4:
        data[int(draw.integers(len(data)))] ^= 1 << int(draw.integers(8))
    elif kind == 5:
        start, stop = np.sort(draw.integers(len(data), size=2))
        del data[start : min(stop, start + 9)]
    return bytes(data)


def wrong(key, value):
    """What is known to be wrong of a field, written down here and nowhere in jpeft."""
    number = type(value) in (int, float)
    if key in SWITCHES:
        return type(value) is not bool
    if key in WHOLE:
        return type(value) is not int or not -1 <= value < 2**63
    if key in RATES:
        return not number or not 0 <= value < 1 - 2**-25
    if key in NUMBERS:
        return not number or not abs(value) < 3.5e38
    if key == "scale":
        return value != "learned" and (not number or not 0 < value < 3.5e38)
    if key in PATHS:
        each = value if type(value) is list else [value]
        return any(type(x) is not str for x in each)
    if key.endswith("_pattern"):
        return type(value) is not dict or any(
            wrong("rank" if key != "alpha_pattern" else "alpha", x)
            for x in value.values()
        )
    if key == "block_size":
        return value not in ("channel", "tensor") and type(value) is not int
    if key in ("transform", "transforms"):
        return False
    return type(value) not in (str, list)


def verdict(file):
    """ "accepted" or "refused"; raises for all that should never be."""
    try:
        transform, train = jpeft.config.read(file)
    except ValueError as error:
        assert str(file) in str(error), error
        return "refused"
    told = tomllib.loads(file.read_text(encoding="utf-8"))
    tables = told["peft"] if type(told["peft"]) is list else [told["peft"]]
    made = transform.transforms if len(tables) > 1 else (transform,)
    assert len(made) == len(tables) and train == told.get("train", {})
    for table, one in zip(tables, made, strict=True):
        assert one.name == table.pop("method")
        for key, value in table.items():
            assert not wrong(key, value), (key, value)
            if one.name not in ("chain", "gated"):
                kept = one.to_config().get(key, getattr(one, key))
                kept = {} if key.endswith("_pattern") and not kept else kept
                kept = list(kept) if type(kept) is tuple else kept
                # NumPy knows float32 by several names.
                assert kept == value or key.endswith("dtype"), (key, value, kept)
    again = tomllib.loads(jpeft.config.to_toml(transform, train))
    assert jpeft.from_config(again) == transform
    return "accepted"


@pytest.mark.parametrize("n", [200, pytest.param(4000, marks=pytest.mark.slow)])
# Of expressions that `re` will one day read otherwise.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_recipes_changed_at_random_are_refused_by_name_or_right(tmp_path, n):
    """No other exception than ours, none without the file, none taken that is wrong."""
    texts = [x.read_text(encoding="utf-8") for x in RECIPES]
    draw, file = np.random.default_rng(0), tmp_path / "a.toml"
    found = Counter()
    for k in range(n):
        file.write_bytes(changed(texts[k % len(texts)], draw))
        found[verdict(file)] += 1
    print(dict(found))
    assert found["refused"] > n // 3 and found["accepted"] > n // 20
