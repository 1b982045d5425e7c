"""The code of the README and of docs/ runs as it stands."""

import inspect
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import jpeft
from jpeft.leaf import KINDS
from jpeft.transform import METHODS

ROOT = Path(__file__).parents[1]
PAGES = {
    f.relative_to(ROOT).as_posix(): f.read_text(encoding="utf-8")
    for f in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}
# Blocks of Python that the tests below run, page by page.
RUN = {
    "README.md": 2,
    "docs/four-bits.md": 1,
    "docs/index.md": 1,
    "docs/language.md": 1,
    "docs/meshes.md": 1,
    "docs/methods.md": 3,
    "docs/refused.md": 1,
    "docs/save.md": 3,
    "docs/start.md": 6,
    "docs/write-a-method.md": 4,
}
# What no test runs says so above itself: `<!-- not run: why -->`.
NOT_RUN = {
    "README.md": ["needs data and models of one's own"],
    "docs/language.md": [
        "minutes to hours; tests/examples/test_language_scripts.py runs the scripts"
    ],
    "docs/measured.md": [
        "hours; tests/benchmarks/test_compare_methods.py runs the scripts on less"
    ],
    "docs/meshes.md": ["needs a step and data of one's own"],
    "docs/start.md": ["installs"],
}


class Block(NamedTuple):
    why_not: str
    language: str
    text: str


def blocks(page):
    found = re.findall(
        r"(?:^<!-- not run: (.*) -->\n)?^```(\w*)\n(.*?)^```$", PAGES[page], re.M | re.S
    )
    return [Block(*x) for x in found]


def python(page):
    return [b.text for b in blocks(page) if b.language == "python" and not b.why_not]


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 24)(tokens)
        return nn.Dense(19)(nn.relu(nn.Dense(32)(x)))


BATCH = {"tokens": jnp.arange(6).reshape(2, 3)}


def cross_entropy(logits, batch):
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"])
    )


@pytest.fixture(scope="module")
def at_hand():
    """What pages take as given: a model and its parameters, some of them adapted."""
    model, tokens = Model(), BATCH["tokens"]
    variables = model.init(jax.random.key(0), tokens)
    peft = jpeft.lora(rank=2, where="linear")
    return {
        "jax": jax,
        "jnp": jnp,
        "jpeft": jpeft,
        "optax": optax,
        "nnx": nnx,
        "model": model,
        "tokens": tokens,
        "batch": BATCH,
        "cross_entropy": cross_entropy,
        "variables": variables,
        "base_params": variables["params"],
        "uses": jpeft.find_uses(model.apply, variables, tokens),
        "peft": peft,
        "params": peft(jax.random.key(0), variables["params"]),
    }


@pytest.fixture
def names(at_hand, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield dict(at_hand)


# --- all pages -----------------------------------------------------------------------


def test_every_block_is_run_or_says_why_not():
    fences = {page: text.count("\n```") for page, text in PAGES.items()}
    assert fences == {page: 2 * len(blocks(page)) for page in PAGES}
    run = {page: len(python(page)) for page in PAGES if python(page)}
    assert run == RUN
    not_run = {p: [b.why_not for b in blocks(p) if b.why_not] for p in PAGES}
    assert {p: why for p, why in not_run.items() if why} == NOT_RUN
    # What is left are the README's two commands, which `.ci/run` takes from there, and
    # texts: formulas, and what a command prints.
    left = [
        (page, b.language)
        for page in PAGES
        for b in blocks(page)
        if b.language != "python" and not b.why_not
    ]
    assert [x for x in left if x[1] != "text"] == [("README.md", "bash")] * 2
    assert [b.language for b in blocks("README.md")][:2] == ["bash", "bash"]


def test_every_link_leads_somewhere():
    def anchors(text):
        heads = re.findall(r"^#+ (.*)$", text, re.M)
        return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads}

    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("https://"):
                continue
            name, _, anchor = link.partition("#")
            file = (ROOT / page).parent / name
            assert file.is_file(), (page, link)
            if anchor:
                assert anchor in anchors(file.read_text(encoding="utf-8")), (page, link)


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    pages = [p.removeprefix("docs/") for p in PAGES if p.startswith("docs/")]
    assert sorted(re.findall(r"[\w-]+\.md", menu)) == sorted(pages)
    books = [f"notebooks/{f.name}" for f in ROOT.glob("docs/notebooks/*.ipynb")]
    assert sorted(re.findall(r"[\w/-]+\.ipynb", menu)) == sorted(books)
    scripts = re.findall(r"examples/\w+\.py", menu)
    assert len(scripts) == 4 and all((ROOT / s).is_file() for s in scripts)


def test_every_promised_name_is_in_the_api():
    there = set(re.findall(r"^::: jpeft\.([\w.]+)$", PAGES["docs/api.md"], re.M))
    rooms = ("config", "hf", "objectives", "optim", "plot", "quant", "sharding")
    roof = {n for n in dir(jpeft) if not n.startswith("_")}
    modules = {n for n in roof if type(getattr(jpeft, n)).__name__ == "module"}
    assert roof - modules <= there
    for room in rooms[2:4]:  # those that promise all that they have
        names_of = vars(getattr(jpeft, room)).items()
        public = {n for n, x in names_of if callable(x) and not n.startswith("_")}
        own = {f"{room}.{n}" for n in public} - {"optim.freeze", "optim.value_and_grad"}
        assert own <= there, own - there
    for name in there:
        owner = jpeft
        for part in name.split("."):
            owner = getattr(owner, part)
        assert owner.__doc__, name


def test_every_promised_name_has_an_example():
    """A doctest, which runs; a warning may have code that shows what to do about it."""
    for name in re.findall(r"^::: jpeft\.([\w.]+)$", PAGES["docs/api.md"], re.M):
        if name.startswith("kernels."):  # on arrays as `quant` makes them
            continue
        promised = jpeft
        for part in name.split("."):
            promised = getattr(promised, part)
        text = inspect.cleandoc(promised.__doc__)
        warning = isinstance(promised, type) and issubclass(promised, Warning)
        assert ">>> " in text or warning and "\n\n    " in text, name


def test_every_message_that_is_explained_exists():
    """The messages of `refused.md` are in the code, put together as Python does."""
    files = sorted(Path(jpeft.__file__).parent.glob("**/*.py"))
    code = "".join(f.read_text(encoding="utf-8") for f in files)
    joined = re.sub(r"[\"']\s*\n\s*f?[\"']", "", code)
    told = re.findall(r"^\| `([^`]+)` \|", PAGES["docs/refused.md"], re.M)
    assert len(told) > 30
    for message in told:
        assert message in joined, message


# --- the README ----------------------------------------------------------------------


def test_the_linen_loop(names):
    exec(python("README.md")[0], names)
    key = jax.random.key(1)
    t, s = names["trainable"], names["opt_state"]
    _, _, first = names["step"](t, s, names["frozen"], BATCH, key)
    for _ in range(30):
        t, s, last = names["step"](t, s, names["frozen"], BATCH, key)
    assert last < first
    base = names["base_params"]
    assert jax.tree.structure(names["merged"]) == jax.tree.structure(base)


def test_the_nnx_lines(names):
    linear = nnx.Linear(24, 19, rngs=nnx.Rngs(0))
    names |= {"model": linear, "x": jnp.ones((2, 24))}
    exec(python("README.md")[1], names)
    assert names["model"](names["x"]).shape == names["y"].shape == (2, 19)


# --- docs/ ---------------------------------------------------------------------------


def test_the_start_page_goes_on_where_the_readme_stops():
    loop, nnx_lines, *_ = python("docs/start.md")
    readme = python("README.md")
    assert loop.startswith(readme[0].rstrip()) and nnx_lines == readme[1]


def test_the_lines_after_the_linen_loop(names):
    tail = python("docs/start.md")[0].removeprefix(python("README.md")[0])
    t, frozen = jpeft.partition(names["params"])
    names |= {"trainable": t, "frozen": frozen, "opt_state": optax.adamw(1e-4).init(t)}
    exec(tail, names)
    assert jax.tree.structure(names["params"]) == jax.tree.structure(
        jpeft.combine(t, frozen)
    )


def test_the_nnx_optimizer_lines(names):
    linear = nnx.Linear(24, 19, rngs=nnx.Rngs(0))
    names |= {"model": linear, "x": jnp.ones((2, 24))}
    exec(python("docs/start.md")[2], names)
    _, adapter, base = nnx.split(names["model"], names["wrt"], ...)
    assert bool((adapter["kernel"]["b"][...] != 0).any())
    assert sorted(base["kernel"]) == ["base"]


@pytest.mark.slow
def test_the_train_state_lines(names):
    names |= {
        "TrainState": TrainState,
        "params": jpeft.lora(rank=8)(jax.random.key(0), names["base_params"]),
        "loss": lambda apply, p, batch: cross_entropy(
            apply({"params": p}, batch["tokens"]), batch
        ),
    }
    exec(python("docs/start.md")[3], names)
    before, after = (
        jpeft.partition(p) for p in (names["params"], names["state"].params)
    )
    for a, b in zip(jax.tree.leaves(before[1]), jax.tree.leaves(after[1]), strict=True):
        assert a.tobytes() == b.tobytes()
    assert int(names["state"].step) == 1


@pytest.mark.slow
def test_the_export_lines(names):
    params = jpeft.quantize("nf4")(jax.random.key(0), names["base_params"])
    params = names["params"] = jpeft.lora(rank=8)(jax.random.key(1), params)
    exec(python("docs/start.md")[4], names)
    want = jpeft.adapt(names["model"].apply)({"params": params}, names["tokens"])
    np.testing.assert_allclose(names["y"], want, rtol=1e-2, atol=1e-2)  # bfloat16


def test_the_recipe_lines(names, capsys):
    exec(python("docs/start.md")[5], names)
    assert 'method = "lora"\nrank = 16' in capsys.readouterr().out


def test_the_shortest_lines(names):
    names["params"] = names["base_params"]
    exec(python("docs/index.md")[0], names)
    assert names["logits"].shape == (2, 3, 19)


def test_the_lines_on_choosing(names, capsys):
    where, chained, virtual = python("docs/methods.md")
    exec(where, names)
    adapted = names["params"]["params"]
    assert adapted["Embed_0"]["embedding"].rank == 2
    assert adapted["Dense_0"]["kernel"].rank == 8
    assert not isinstance(adapted["Dense_1"]["kernel"], jpeft.AdaptedLeaf)
    exec(chained, names)
    # LoRA on the last layer, 32 x 19, and the first whole.
    assert f"trainable={8 * (32 + 19) + 25 * 32}" in capsys.readouterr().out
    exec(virtual, names)
    assert names["logits"].shape == (2, 3, 19)


def test_the_quantised_lines(names, capsys):
    exec(python("docs/four-bits.md")[0], names)
    assert names["merged"]["Dense_0"]["kernel"].dtype == jnp.bfloat16
    assert "Dense_0/kernel" in capsys.readouterr().out


def test_the_lines_on_meshes(names, capsys):
    exec(python("docs/meshes.md")[0], names)
    assert "'model'" in capsys.readouterr().out
    np.testing.assert_allclose(names["y"], 16.0)


def test_the_lines_on_files(names):
    saved, run, served = python("docs/save.md")
    peft, params = names["peft"], names["params"]
    exec(saved, names)
    assert names["peft"] == peft
    names["opt_state"] = optax.adamw(1e-4).init(jpeft.partition(params)[0])
    exec(run, names)
    assert jax.tree.structure(names["params"]) == jax.tree.structure(params)
    exec(served, names)
    for a, b in zip(
        jax.tree.leaves(names["plain"]),
        jax.tree.leaves(names["base_params"]),
        strict=True,
    ):
        assert a.tobytes() == b.tobytes()


def test_the_lines_on_refusals(names, capsys):
    exec(python("docs/refused.md")[0], names)
    assert "A pattern must match the whole path" in capsys.readouterr().out


def test_the_lines_on_the_loss_of_a_large_vocabulary(names):
    names |= {
        "params": {"embed": {"embedding": jnp.zeros((11, 5))}},
        "hidden": jnp.ones((2, 3, 5)),
        "labels": BATCH["tokens"],
        "mask": jnp.ones((2, 3), bool),
    }
    exec(python("docs/language.md")[0], names)
    np.testing.assert_allclose(names["loss"].mean(), np.log(11), rtol=1e-6)


def test_a_method_of_ones_own(names):
    """And nothing of it stays for the tests that come after."""
    tables = (KINDS, METHODS)
    before = [dict(table) for table in tables]
    try:
        for block in python("docs/write-a-method.md"):
            exec(block, names)
    finally:
        for table, kept in zip(tables, before, strict=True):
            for name in table.keys() - kept.keys():
                del table[name]
    want = jpeft.adapt(names["model"].apply)(names["again"], names["tokens"])
    np.testing.assert_array_equal(want, names["logits"])
    base = names["variables"]
    assert jax.tree.structure(names["merged"]) == jax.tree.structure(base)
