"""The website is whole: every page, picture, link and target, and nothing that a browser would fetch from elsewhere."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from environments import demand_sphinx

from workshop import website

ROOT = Path(__file__).parents[1]
# The theme's own pages and files, which nobody writes links in.
GENERATED = {"search.html", "genindex.html"}


class Page(HTMLParser):
    """The links of a page, what it loads, its targets, and the pictures without words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.targets: set[str] = set()
        self.wordless: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.targets.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("script", "img") and "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") == "stylesheet":
            self.loaded.append(given["href"])
        if tag == "img" and not given.get("alt"):
            self.wordless.append(given["src"][:60])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("website")
    demand_sphinx(website.build(into))
    return into


@pytest.fixture(scope="module")
def pages(built: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in built.rglob("*.html")}


def test_every_notebook_has_its_page(built: Path) -> None:
    for notebook in [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("exercises/*.ipynb")]:
        assert (built / notebook.relative_to(ROOT)).with_suffix(".html").exists(), notebook
    assert 'url=README.html"' in (built / "index.html").read_text()


def test_links_lead_somewhere(pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or path.name in GENERATED:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            whole = target in pages and (
                not parts.fragment or unquote(parts.fragment) in pages[target].targets
            )
            if not whole and not (target.is_file() and not parts.fragment):
                broken.append((path.name, link))
    assert set(broken) == set()
    assert sum(len(page.links) for page in pages.values()) > 1_000


def test_nothing_is_fetched_from_elsewhere(pages: dict[Path, Page]) -> None:
    """For a room without network, from a folder."""
    for path, page in pages.items():
        assert [source for source in page.loaded if urlsplit(source).netloc] == [], path


def test_every_picture_has_its_words(pages: dict[Path, Page]) -> None:
    assert {path.name: page.wordless for path, page in pages.items() if page.wordless} == {}


def test_each_claim_of_the_article_leads_to_its_cell(built: Path, pages: dict[Path, Page]) -> None:
    """From the first page, and from the page of the verdicts, which says the same."""
    for name in ("README.html", "website/verdicts.html"):
        claims = [link for link in pages[built / name].links if "#claim-" in link]
        assert len(claims) == 16, name
