"""Checks of what a method's class says about itself. None of them trains."""

from __future__ import annotations

import difflib
import inspect
import math
import random
import re
from typing import Any

from equipoise.errors import EquipoiseError
from equipoise.testing.compare import difference, snapshot
from equipoise.testing.report import fail
from equipoise.testing.subject import Subject
from equipoise.training import Choice, Integer, LogUniform, Method, Paper, Uniform
from equipoise.training.method import HOOKS

STATE = ("state_dict", "load_state_dict")


def check_name(subject: Subject) -> None:
    """The class has a slug of its own: lower-case letters, digits and single hyphens."""
    name = vars(subject.method).get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        fail(f"name = {name!r}", 'Write a slug as a literal in the class body: name = "my-method"')


def check_summary(subject: Subject) -> None:
    """The class docstring begins with a summary of one line."""
    text = inspect.cleandoc(vars(subject.method).get("__doc__") or "")
    if not text.strip():
        fail(
            "the class has no docstring", "Its first line is what `equipoise methods` prints: say what the method does"
        )
    first, *rest = text.split("\n")
    if len(first) > 120 or (rest and rest[0].strip()):
        fail(f"the docstring begins with {first!r}", "Begin with one line of at most 120 characters, then a blank line")


def check_paper(subject: Subject) -> None:
    """``paper`` is a ``Paper`` with title, authors and venue, or None."""
    paper = subject.method.paper
    if paper is None:
        return
    if not isinstance(paper, Paper):
        fail(
            f"paper is a {type(paper).__name__}",
            "Write paper = Paper(title, authors, venue, url), or None for folklore",
        )
    for name in ("title", "authors", "venue"):
        if not str(getattr(paper, name)).strip():
            fail(f"paper.{name} is empty", "Cite the paper completely")
    if paper.url and not re.match(r"https?://\S+$", paper.url):
        fail(f"paper.url = {paper.url!r}", "Give a URL that begins with https://, or leave it out")


def check_hooks(subject: Subject) -> None:
    """Hooks have the signatures of ``Method``, and no method's name is nearly a hook's."""
    for name in (*HOOKS, *STATE):
        ours, theirs = (_arguments(getattr(cls, name)) for cls in (Method, subject.method))
        if ours != theirs:
            fail(f"{name}({', '.join(theirs)})", f"Its signature must be {name}({', '.join(ours)})")
    for cls in subject.method.__mro__:
        if cls in Method.__mro__:
            break
        for name, value in vars(cls).items():
            if name.startswith("_") or not inspect.isfunction(value) or hasattr(Method, name):
                continue
            near = difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.85)
            if near:
                fail(
                    f"{name} is no hook, so that no run calls it",
                    f"Call it {near[0]}, or choose a name less like that hook's",
                )


def check_settings(subject: Subject) -> None:
    """The defaults (or the given settings) are valid, and every argument is kept under its own name."""
    for name, parameter in inspect.signature(subject.method).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            fail(f"the constructor takes {parameter}", "Name every argument, so that it can be tuned, shown and stored")
        if parameter.default is parameter.empty and name not in subject.settings:
            fail(f"the argument {name} has no default", f"Give it one, or check with settings={{{name!r}: ...}}")
    method = subject.make()
    for name in inspect.signature(subject.method).parameters:
        if not hasattr(method, name):
            fail(f"the object has no attribute {name!r}", f"Keep the argument: self.{name} = {name}")
    for name, value in subject.settings.items():
        if not _same(getattr(method, name), value):
            fail(
                f"{name} was given as {value!r} and kept as {getattr(method, name)!r}",
                "Keep the value as it was given; put what is derived from it under another name",
            )
    again = subject.method(**method.settings())
    for one, other in ((method, again), (method, subject.make())):
        if _text(one) != _text(other):
            fail(
                f"two objects of equal settings print as {one!r} and {other!r}",
                "A checkpoint is recognised by this text: let settings be plain values, or give them a __repr__",
            )


def check_space(subject: Subject) -> None:
    """Every dimension of ``space`` is a constructor argument, and every value that it may give is accepted."""
    arguments = list(inspect.signature(subject.method).parameters)
    space = subject.method.space
    for key, dimension in space.items():
        if key not in arguments:
            fail(
                f"space has {key!r}",
                f"Its keys must be constructor arguments: {', '.join(arguments) or 'there are none'}",
            )
        if not isinstance(dimension, Uniform | LogUniform | Integer | Choice):
            fail(
                f"space[{key!r}] is a {type(dimension).__name__}",
                "Use Uniform, LogUniform, Integer or Choice of equipoise.training",
            )
    almost = math.nextafter(1.0, 0.0)
    draws = [{key: space[key].at(u)} for key in space for u in (0.0, 0.25, 0.5, 0.75, almost)]
    source = random.Random(0)
    draws += [{key: dimension.at(source.random()) for key, dimension in space.items()} for _ in range(16)]
    for values in draws:
        try:
            method = subject.make(**values)
        except Exception as error:  # a method may raise anything here; all of it is a finding
            fail(f"{values} from its space is refused ({error})", "Narrow the space to what the constructor accepts")
        for key, value in values.items():
            if not _same(getattr(method, key), value):
                fail(f"{key} = {value!r} is kept as {getattr(method, key)!r}", "Keep the value as it was given")


def check_errors(subject: Subject) -> None:
    """A setting that is no number is refused by an ``EquipoiseError`` that names it."""
    numeric = {key for key, dim in subject.method.space.items() if isinstance(dim, Uniform | LogUniform | Integer)}
    for name, value in subject.make().settings().items():
        if name in numeric or (isinstance(value, int | float) and not isinstance(value, bool)):
            for bad in (math.nan, "text"):
                _refused(subject, name, bad)


def _refused(subject: Subject, name: str, bad: Any) -> None:
    remedy = "Check arguments in the constructor: equipoise.errors.check_range, check_integer, check_choice"
    try:
        subject.make(**{name: bad})
    except EquipoiseError as error:
        if name not in str(error):
            fail(f"{name} = {bad!r} is refused by {str(error)!r}, which does not name the argument", remedy)
    except Exception as error:
        fail(f"{name} = {bad!r} raises {type(error).__name__}: {error}", remedy)
    else:
        fail(f"{name} = {bad!r} is accepted", remedy)


def _arguments(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [str(p.replace(annotation=p.empty)) for p in parameters]


def _text(method: Method) -> str:
    """How a checkpoint knows the method: its ``repr`` without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(method))


def _same(kept: Any, given: Any) -> bool:
    if isinstance(kept, int | float) and isinstance(given, int | float):
        return kept == given
    return kept is given or difference(snapshot(kept), snapshot(given)) is None
