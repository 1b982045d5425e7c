"""What is installed is what is in the repository, and works without it."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = {f.relative_to(ROOT / "configs") for f in ROOT.glob("configs/**/*.toml")}
CODE = {f.relative_to(ROOT) for f in ROOT.glob("jpeft/**/*.py")}


def run(*command, cwd, **variables):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(folder, its sdist, its wheel), built as for a release from a copy."""
    folder = tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(
        *(".git", ".venv*", ".*_cache", "build", "dist", "site", "runs"),
        *("__pycache__", "*.egg-info"),
    )
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "-q", "--target")
    run(*pip, folder / "tools", "build", cwd=folder)
    out = folder / "dist"
    # pip's own `build` folder in the tree would be taken for the tool of that name.
    run(
        *("-P", "-m", "build", "--outdir", out, folder / "tree"),
        cwd=folder,
        PYTHONPATH=str(folder / "tools"),
    )
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return folder, sdist, wheel


@pytest.mark.slow
def test_the_wheel_holds_code_recipes_and_licence(built):
    _, _, wheel = built
    with zipfile.ZipFile(wheel) as file:
        names = {Path(n) for n in file.namelist()}
        (metadata,) = (n for n in names if n.name == "METADATA")
        text = file.read(metadata.as_posix()).decode()
    assert {n for n in names if n.suffix == ".py"} == CODE
    held = {n for n in names if n.suffix == ".toml"}
    assert held == {"jpeft/recipes" / n for n in RECIPES}
    assert Path("jpeft/py.typed") in names
    assert metadata.parent / "licenses" / "LICENSE" in names
    head = text.split("\n\n")[0]
    assert "\nLicense-Expression: Apache-2.0\n" in head
    assert "\nLicense-File: LICENSE\n" in head


@pytest.mark.slow
def test_the_sdist_holds_its_tests_and_what_they_read(built):
    _, sdist, _ = built
    with tarfile.open(sdist) as file:
        names = {Path(*Path(n).parts[1:]) for n in file.getnames()}
    for name in ("LICENSE", "CHANGELOG.md", "pyproject.toml", "setup.py", ".ci/run"):
        assert Path(name) in names, name
    assert names >= CODE | {"configs" / n for n in RECIPES}
    for room in ("tests", "examples", "docs"):
        files = (f for f in ROOT.glob(f"{room}/**/*") if "__pycache__" not in f.parts)
        missing = {f.relative_to(ROOT) for f in files if f.is_file()} - names
        assert not missing, missing


@pytest.mark.slow
def test_the_installed_wheel_runs_the_readme(built):
    """Apart from the repository: only the tests and what they read is copied."""
    folder, _, wheel = built
    site, apart = folder / "site", folder / "apart"
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps")
    run(*pip, "--target", site, wheel, cwd=folder)
    (apart / "tests").mkdir(parents=True)
    for room in ("docs", "examples"):
        shutil.copytree(ROOT / room, apart / room)
    for file in (*ROOT.glob("*.*ml"), *ROOT.glob("*.md"), ROOT / "LICENSE"):
        shutil.copy(file, apart)
    for name in ("conftest.py", "shapes.py", "test_readme.py"):
        shutil.copy(ROOT / "tests" / name, apart / "tests")
    lines = (
        "import jpeft; print(jpeft.__file__);"
        "print(jpeft.from_config('lora').transforms[0].rank);"
        "print(len(jpeft.config.recipes()))"
    )
    where, rank, many = run("-c", lines, cwd=apart, PYTHONPATH=str(site)).splitlines()
    assert Path(where) == site / "jpeft" / "__init__.py"
    assert (int(rank), int(many)) == (8, len(RECIPES))
    run(
        *("-m", "pytest", "-q", "-n0", "-m", "slow or not slow"),
        *("-p", "no:cacheprovider", "tests/test_readme.py"),
        cwd=apart,
        PYTHONPATH=str(site),
    )
