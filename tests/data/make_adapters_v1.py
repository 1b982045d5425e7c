"""Writes adapters_v1.zip: an adapter of each method, as version 0.1.0 saved it.

    python tests/data/make_adapters_v1.py adapters_v1.zip

Run on the last commit whose leaves named their axes one by one (a90aded), where the
table of methods stood in tests/methods/test_laws.py.  For each method: the folder that
`jpeft.save` wrote of arrays that are somewhere else than at the start, and the output
of the adapted model; for each model its base and its inputs.
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "methods"),
]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from test_laws import METHODS, adapted, form, trained  # noqa: E402

import jpeft  # noqa: E402

with tempfile.TemporaryDirectory() as folder:
    written = Path(folder)
    for method, entry in METHODS.items():
        name = entry.forms + "scan"
        f, params = form(name), trained(method, name)
        jpeft.save(written / method, params, entry.make())
        output = np.asarray(adapted(name)(params, *f.args))
        base = dict(
            zip(map(str, range(10**6)), jax.tree.leaves(f.params), strict=False)
        )
        args = {f"arg_{k}": np.asarray(x) for k, x in enumerate(f.args)}
        np.savez(written / f"{method}.npz", output=output)
        np.savez(written / f"base_{name}.npz", **base, **args)
    shutil.make_archive(str(Path(sys.argv[1]).with_suffix("")), "zip", folder)
