"""Notebooks and the small examples as pages: `mkdocs` itself knows Markdown alone.

A link to `notebooks/start.ipynb` or `../examples/linen.py` leads to the file where a
reader sees the repository, and to its page where one sees the built documentation.
"""

import json
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[1]
EXAMPLES = ("linen", "nnx", "quantised", "serve")


class Shown(File):
    """A file that is a page, though its name does not end in .md."""

    def is_documentation_page(self):
        return True


def on_files(files, config):
    for file in [f for f in files if f.src_uri.endswith(".ipynb")]:
        files.remove(file)
        files.append(shown(config, file.src_uri, Path(file.abs_src_path)))
    for name in EXAMPLES:
        path = f"examples/{name}.py"
        files.append(shown(config, path, ROOT / path))
    return files


def shown(config, uri, path):
    included = InclusionLevel.INCLUDED  # else *.py is left out
    return Shown.generated(config, uri, content=as_markdown(path), inclusion=included)


def on_page_markdown(markdown, **_):
    return markdown.replace("](../examples/", "](examples/")


def as_markdown(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return f"# `examples/{path.name}`\n\n```python\n{text}```\n"
    return "\n\n".join(map(cell_as_markdown, json.loads(text)["cells"])) + "\n"


def cell_as_markdown(cell):
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return text
    printed = "".join(line for out in cell["outputs"] for line in out["text"])
    below = f"\n\n```text\n{printed.rstrip()}\n```" if printed else ""
    return f"```python\n{text}\n```{below}"
