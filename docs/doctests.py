"""For the API's pages: examples in docstrings become code, their arguments a list.

Griffe reads the source and does not run it.  What it cannot see there is taken from the
imported package: that `jpeft.lora` is the class `LoRA`, called, and that `jpeft.adapt`
is the function and not the room of that name.
"""

import inspect
import re

import griffe

import jpeft

ARGUMENT = re.compile(r"(?:\w+(?:, \w+)*|\w+=\S+): +\S")


class Plain(griffe.Extension):
    """Markdown of our docstrings, which are written for a terminal."""

    def on_package(self, *, pkg, **kwargs):
        if pkg.name != "jpeft":
            return
        for name, promised in vars(jpeft).items():
            if isinstance(promised, type) and name != promised.__name__:
                module = pkg[promised.__module__.partition(".")[2]]
                module.set_member(name, called(name, promised, module))
        function = called("adapt", jpeft.adapt, pkg)
        function.members.update(pkg["adapt"].members)  # the room stays reachable
        pkg.set_member("adapt", function)

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = "\n\n".join(
                map(written, obj.docstring.value.split("\n\n"))
            )


def called(name, promised, parent):
    """What a call of it takes, and its docstring, as Griffe would have a function."""
    kinds = griffe.ParameterKind
    parameters = griffe.Parameters(
        *(
            griffe.Parameter(
                p.name,
                kind=kinds(p.kind.description),
                default=None if p.default is p.empty else repr(p.default),
            )
            for p in inspect.signature(promised).parameters.values()
        )
    )
    text = "\n\n".join(map(written, inspect.getdoc(promised).split("\n\n")))
    function = griffe.Function(name, parameters=parameters, parent=parent)
    function.docstring = griffe.Docstring(text, parent=function)
    return function


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
