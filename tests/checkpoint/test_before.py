"""Adapters that earlier versions saved load, and act as they did."""

import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from every_method import METHODS, TILES, adapted, form

import jpeft

FILE = Path(__file__).parents[1] / "data" / "adapters_v1.zip"
SAVED = sorted({p.split("/")[0] for p in zipfile.ZipFile(FILE).namelist() if "/" in p})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v1")
    zipfile.ZipFile(FILE).extractall(folder)
    return folder


def test_there_is_one_of_each_method_that_there_was():
    assert len(SAVED) == 36 and set(SAVED) <= set(METHODS)


@pytest.mark.sample(4)
@pytest.mark.parametrize("method", SAVED)
def test_an_adapter_saved_by_version_0_1_loads(method, saved):
    name = METHODS[method].forms + "scan"
    like, at = jax.tree.flatten(form(name).params)
    with np.load(saved / f"base_{name}.npz") as file:
        base = jax.tree.unflatten(at, [file[str(k)] for k in range(len(like))])
        args = [file[f"arg_{k}"] for k in range(len(form(name).args))]
    params = jpeft.load(saved / method, jax.tree.map(jax.numpy.asarray, base))
    expected = np.load(saved / f"{method}.npz")["output"]
    np.testing.assert_allclose(adapted(name)(params, *args), expected, **TILES)
    made = METHODS[method].make()
    assert jpeft.read_transform(saved / method) == made
