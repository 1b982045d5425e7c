"""Recipes: unknown keys are refused with the nearest known one."""

import pytest

import jpeft

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


def test_bad_files(tmp_path):
    (tmp_path / "lora.toml").write_text("[[peft]\n")
    with pytest.raises(ValueError, match="not TOML"):
        jpeft.from_config(tmp_path / "lora.toml")
    with pytest.raises(FileNotFoundError, match="nearest: .*lora.toml"):
        jpeft.from_config(tmp_path / "lroa.toml")


def test_a_function_in_where_has_no_configuration():
    transform = jpeft.lora(rank=2, where=lambda path, leaf: True)
    with pytest.raises(ValueError, match="is a Python function"):
        transform.to_config()
    assert "callable" in transform.describe()["where"]
