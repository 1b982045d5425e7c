"""The script that follows the links of the built documentation sees broken ones."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs/check_site.py"
API = """
<div class="doc doc-object"><h3 id="jpeft.lora">lora</h3>
<div class="doc doc-contents"><p>A transform.</p></div></div>
"""


@pytest.fixture
def checked(tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]

    def run(index, api=API):
        (tmp_path / "index.html").write_text(index)
        (tmp_path / "api.html").write_text(api)
        return main(tmp_path), capsys.readouterr().out

    return run


def test_links_that_lead_somewhere_are_counted(checked):
    text = '<h1 id="top"></h1><a href="#top"></a><a href="api.html#jpeft.lora"></a>'
    bad, said = checked(text + '<a href="https://jax.dev/x"></a>')
    assert not bad
    assert said == "2 pages, 2 links inside, 1 to elsewhere\n"


@pytest.mark.parametrize(
    "link, fault",
    [
        ("none.html", "no such file"),
        ("api.html#jpeft.dora", "nothing of that name"),
        ("#none", "nothing of that name"),
        ("http://jax.dev", "is no https address"),
    ],
)
def test_a_link_that_leads_nowhere_is_named(checked, link, fault):
    bad, said = checked(f'<a href="{link}"></a>')
    assert bad
    assert link in said and fault in said


def test_a_name_without_its_description_is_named(checked):
    bad, said = checked("", API.replace("<p>A transform.</p>", "lora = LoRA"))
    assert bad
    assert "jpeft.lora has no description" in said
