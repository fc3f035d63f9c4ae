"""Hooks of the documentation site (mkdocs.yml).

They add pages that are made of something else, and turn links to files outside of `docs/`, which
the repository's own view follows, into what the site can show. What is wrong is a warning, which
`--strict` makes an error.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from scripts.command_page import ROOT, command_page

_LOG = get_plugin_logger("arm_ray")

# Files of the repository that are pages of the site.
INCLUDED = {
    "changelog.md": "CHANGELOG.md",
    "cluster-files.md": "cluster/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "study-files.md": "studies/README.md",
}
_PAGES = {path: page for page, path in INCLUDED.items()}
_FENCED = re.compile(r"(^[ ]*```.*?^[ ]*```[ ]*$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[([^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*)\]\(([^()\s]+)\)")
# What a browser fetches by itself, unlike a link that is followed.
_LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"'](?:https?:)?//[^\"']*"
    r"|<link\b(?![^>]*rel=[\"'](?:canonical|next|prev))[^>]*\bhref=[\"'](?:https?:)?//[^\"']*"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in `docs/`."""
    for page, path in INCLUDED.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "commands.md", content=command_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Rewrite links that leave `docs/`, or whose page lies elsewhere on the site."""
    at = page.file.src_uri
    source = INCLUDED.get(at, f"docs/{at}")

    def replaced(found: re.Match[str]) -> str:
        return _link(found[1], found[2], at, source, config.repo_url)

    parts = _FENCED.split(markdown)
    return "".join(p if i % 2 else _LINK.sub(replaced, p) for i, p in enumerate(parts))


def _link(text: str, target: str, at: str, source: str, repository: str | None) -> str:
    """A link of the file `source` (a path in the repository) as the page `at` has it."""
    path, hash_, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return f"[{text}]({target})"
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    in_site = file.removeprefix("docs/") if file.startswith("docs/") else _PAGES.get(file)
    if in_site is not None:
        there = posixpath.relpath(in_site, posixpath.dirname(at) or ".")
        return f"[{text}]({there}{hash_}{anchor})"
    if not (ROOT / file).exists():
        _LOG.warning("%s links to %s, and there is no %s", source, target, file)
    if repository:
        return f"[{text}]({repository.rstrip('/')}/blob/main/{file}{hash_}{anchor})"
    plain = text.strip("`")
    return f"`{file}`" if plain in (file, path) else f"{text} (`{file}`)"


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Warn of what a page would load from the network."""
    for found in _LOADED.finditer(output):
        _LOG.warning("%s loads %s", page.file.src_uri, found[0])
    return output
