"""What `mkdocs build` does besides: it fills pages, shows the files they point to, and checks every page it wrote."""

from __future__ import annotations

import logging
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.generated import RESULTS, ROOT, filled

log = logging.getLogger("mkdocs.hooks.asynctrain")

SOURCE = "source"  # where the site shows files of the repository that are no pages
LANGUAGES = {".py": "python", ".toml": "toml", ".html": "html", ".json": "json", ".proto": "protobuf", ".cff": "yaml"}
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}

_OUTSIDE = re.compile(r"\]\(((?:\.\./)+[^)#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the plots of the benchmarks, and a page for each file of the repository that a page points to."""
    shown = {"CHANGELOG.md"}
    for file in files.documentation_pages():
        shown |= {path for target in _OUTSIDE.findall(file.content_string) if (path := _outside(file.src_uri, target))}
    for path in sorted(shown):
        files.append(File.generated(config, f"{SOURCE}/{path.removesuffix('.md')}.md", content=_as_page(path)))
    for plot in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what the page takes from the repository, and point to the pages of its files."""
    here = page.file.src_uri
    try:
        markdown = filled(markdown)
    except ValueError as error:
        raise PluginError(f"{here}: {error}") from error

    def pointing(found: re.Match[str]) -> str:
        path = _outside(here, found[1])
        target = f"{SOURCE}/{path.removesuffix('.md')}.md" if path else ""
        return f"]({posixpath.relpath(target, posixpath.dirname(here))}" if path else found[0]

    return _OUTSIDE.sub(pointing, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Warn of links that lead nowhere, and of anything that a browser would fetch from somebody else."""
    site = Path(config.site_dir)
    pages = {path: _read(path) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for address in page.loaded:
            if urlsplit(address).netloc:
                log.warning("%s: loads %s, which is somebody else's", path.relative_to(site), address)
        for address in page.loaded + page.links:
            if not _leads_somewhere(site, path, address, pages):
                log.warning("%s: %s leads nowhere", path.relative_to(site), address)


def _outside(page: str, target: str) -> str:
    """Return the path of what is pointed to from the root of the repository, or nothing if that is a page."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return "" if path.startswith("docs/") else path


def _as_page(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text.replace("](docs/", f"]({'../' * (path.count('/') + 1)}")
    return f"# {Path(path).name}\n\n`{path}`\n\n``````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n``````\n"


class _Read(HTMLParser):
    """What a page has: the addresses it loads, those it links to, and the places that can be pointed to."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if (attribute := LOADING.get(tag)) in given and given.get("rel") not in ("next", "prev", "canonical"):
            self.loaded.append(given[str(attribute)])


def _read(path: Path) -> _Read:
    page = _Read()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def _leads_somewhere(site: Path, path: Path, address: str, pages: dict[Path, _Read]) -> bool:
    """Whether an address within the site is there; those of others are not asked for."""
    scheme, host, name, _, fragment = urlsplit(address)
    if scheme or host:
        return True
    target = site / unquote(name).lstrip("/") if name.startswith("/") else path.parent / unquote(name)
    target = (path if not name else target / "index.html" if target.is_dir() else target).resolve()
    if not target.is_file():
        return False
    return not fragment or target not in pages or unquote(fragment) in pages[target].places
