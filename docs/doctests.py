"""For the API's pages: examples in docstrings become code, their arguments a list."""

import re

import griffe

ARGUMENT = re.compile(r"(?:\w+(?:, \w+)*|\w+=\S+): +\S")


class Plain(griffe.Extension):
    """Markdown of our docstrings, which are written for a terminal."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = "\n\n".join(
                map(written, obj.docstring.value.split("\n\n"))
            )


def written(paragraph):
    if paragraph.startswith(">>>"):
        return f"```pycon\n{paragraph}\n```"
    lines = paragraph.split("\n")
    if paragraph[:1].isspace() or not ARGUMENT.match(lines[0]):
        return paragraph
    return "\n".join(
        re.sub(r"^(.*?):", r"- `\1`:", line) if ARGUMENT.match(line) else line
        for line in lines
    )
