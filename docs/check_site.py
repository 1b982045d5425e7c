"""Follows every link of the built documentation; exits with 1 where one leads nowhere.

    mkdocs build --strict -d site && python docs/check_site.py site

Links inside need a file, and an element of the name behind a `#`.  Of links
to elsewhere only the form is looked at.  Every promised name needs its description.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page links to, and the names that links to it may end in."""

    def __init__(self, path):
        super().__init__()
        self.links, self.names = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.names |= {found[n] for n in ("id", "name") if found.get(n)}
        self.links += [found[n] for n in ("href", "src") if found.get(n)]


def faults(pages, site):
    """A line for each link that leads nowhere."""
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("data", "mailto", "javascript"):
                continue
            if elsewhere(link):
                if parts.scheme != "https" or "." not in parts.netloc:
                    yield f"{path.name}: {link} is no https address"
                continue
            if path.name == "404.html":  # shown at any depth, so its links are absolute
                goal = site / parts.path.lstrip("/")
            else:
                goal = path.parent / unquote(parts.path) if parts.path else path
            goal = goal.resolve()
            if goal.is_dir():
                goal /= "index.html"
            if not goal.is_file():
                yield f"{path.name}: {link}: no such file"
            elif parts.fragment and goal in pages:
                if unquote(parts.fragment) not in pages[goal].names:
                    yield f"{path.name}: {link}: nothing of that name"


def elsewhere(link):
    parts = urlsplit(link)
    return bool(parts.scheme or parts.netloc)


def without_description(path):
    """A line for each name of the API below whose heading stands no sentence."""
    entries = path.read_text(encoding="utf-8").split('<div class="doc doc-object')
    for entry in entries[1:]:
        name = re.search(r'id="(jpeft[\w.]*)"', entry)
        if name and "<p>" not in entry.partition('class="doc doc-contents')[2]:
            yield f"{path.name}: {name[1]} has no description"


def main(site):
    site = site.resolve()
    pages = {path: Page(path) for path in site.rglob("*.html")}
    found = [*faults(pages, site), *without_description(site / "api.html")]
    links = [link for page in pages.values() for link in page.links]
    there = sum(map(elsewhere, links))
    print(*found, sep="\n", end="\n" if found else "")
    print(
        f"{len(pages)} pages, {len(links) - there} links inside, {there} to elsewhere"
    )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
