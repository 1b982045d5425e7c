"""Ships the recipes of `configs/` as `jpeft.recipes`; all else is in pyproject.toml."""

from setuptools import find_packages, setup

# Users and scripts find them in `configs/`; a wheel has only what is below `jpeft`.
recipes = {
    "jpeft.recipes": "configs",
    "jpeft.recipes.sft": "configs/sft",
    "jpeft.recipes.language": "configs/language",
}
setup(
    packages=[*find_packages(include=["jpeft*"]), *recipes],
    package_dir=recipes,
    package_data={"jpeft": ["py.typed"], **dict.fromkeys(recipes, ["*.toml"])},
)
