"""The page as one text: nothing that it needs is anywhere else, and nothing in it is run but ours.

What comes from a run is escaped by the template engine, and in JSON by `htmlsafe_json_dumps`. The
page's own policy allows the scripts that are named in it by their digests, and no other.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from importlib import resources

import jinja2
from markupsafe import Markup

import arm_ray
from arm_ray.report.page.compared import compared_sections
from arm_ray.report.page.library import plotting_library
from arm_ray.report.page.palette import DARK, LIGHT, Theme
from arm_ray.report.page.view import RunView
from arm_ray.secrets import environment_hidden


def render(views: Sequence[RunView], *, is_live: bool = False) -> str:
    """The page.

    Args:
        views: The runs; several are compared.
        is_live: Whether it asks the server that it came from for news.
    """
    library = plotting_library()
    # Its names would be everybody's otherwise.
    library = None if library is None else f"(()=>{{{library}\n}})();"
    themes = json.dumps({"light": dict(LIGHT), "dark": dict(DARK)})
    program = _file("page.js").replace("THEMES", themes, 1)
    compared = compared_sections(views) if len(views) > 1 else []
    if len(views) > 1:
        contents = [(s.id, s.title) for s in compared]
        contents += [(view.prefix, view.record.name) for view in views]
    else:
        contents = [(s.id, s.title) for s in views[0].sections]
        contents += [(f"{views[0].prefix}-parts", "Parts")] if views[0].parts else []
    return _template().render(
        views=views,
        compared=compared,
        contents=contents,
        title=views[0].record.name if len(views) == 1 else f"{len(views)} runs compared",
        version=arm_ray.__version__,
        live=is_live,
        policy=_policy([program, *([library] if library else [])], is_live=is_live),
        # Ours, and so neither escaped nor able to end their elements: see `_inline`.
        style=_inline(_style()),
        library=None if library is None else _inline(library),
        program=_inline(program),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"page": _file("page.html.j2")}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: environment_hidden(value) if type(value) is str else value,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    return environment.get_template("page")


@functools.cache
def _file(name: str) -> str:
    return resources.files("arm_ray.report.page").joinpath(name).read_text(encoding="utf-8")


def _style() -> str:
    return (
        f":root{{{_variables(LIGHT)}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}" + _file("page.css")
    )


def _variables(theme: Theme) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in theme.items())


def _inline(text: str) -> Markup:
    """Text of our own files within `<script>` or `<style>`, which it must not end."""
    if "</" in text and any(end in text.lower() for end in ("</script", "</style")):
        raise ValueError("a script or a style would end its own element")
    return Markup(text)  # noqa: S704


def _policy(scripts: Sequence[str], *, is_live: bool) -> str:
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        f"base-uri 'none'; form-action 'none'" + ("; connect-src 'self'" if is_live else "")
    )
