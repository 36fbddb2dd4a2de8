"""Check a built site: every link, anchor and picture leads somewhere,
and no page loads anything from another host.

    python docs/check_links.py build/site

Addresses on other hosts are checked for their syntax only, so that the check needs no network.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Elements that load what they name while the page opens; `link` does for these relations.
LOADING = {"img", "script", "iframe", "source", "video", "audio", "object", "embed", "track", "input"}
LOADED_LINKS = {
    "stylesheet",
    "icon",
    "preload",
    "prefetch",
    "modulepreload",
    "manifest",
    "preconnect",
    "dns-prefetch",
}
#: Classes for which the theme's script would fetch a library from a public host.
FETCHED_CLASSES = {"mermaid", "pyodide", "glightbox"}


class Page(HTMLParser):
    """The anchors of one page, what it links to and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and set(given.get("rel", "").split()) & LOADED_LINKS:
            self.loads.append(given.get("href", ""))
        for fetched in FETCHED_CLASSES & set(given.get("class", "").split()):
            self.loads.append(f"https://unpkg.com/{fetched}")
        if tag in LOADING:
            self.loads += [given[name] for name in ("src", "data") if given.get(name)]
            self.loads += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]
        self.loads += re.findall(r"url\(\s*['\"]?([^'\")]+)", given.get("style", ""))


def problems(site: Path) -> list[str]:
    """One line for everything that is broken, `page: address: what is wrong`."""
    pages = {file.resolve(): Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site}: holds no page"]
    for file, page in pages.items():
        name = file.relative_to(site.resolve()).as_posix()
        relative = name != "404.html"  # it is served for every address, so its links start at the site's root
        found += [
            f"{name}: {a}: {wrong}" for a in page.links if relative and (wrong := _broken(a, file, pages))
        ]
        for address in page.loads:
            parts = urlsplit(address)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                found.append(f"{name}: {address}: is loaded from another host")
            elif relative and (wrong := _broken(address, file, pages)):
                found.append(f"{name}: {address}: {wrong}")
    for sheet in sorted(site.rglob("*.css")):
        for address in re.findall(
            r"(?:url\(|@import)\s*['\"]?(https?:[^'\")\s]+|//[^'\")\s]+)", sheet.read_text(encoding="utf-8")
        ):
            found.append(f"{sheet.relative_to(site).as_posix()}: {address}: is loaded from another host")
    return found


def _broken(address: str, file: Path, pages: dict[Path, Page]) -> str:
    """What is wrong with a link on page `file`, or nothing."""
    try:
        parts = urlsplit(address)
    except ValueError as error:
        return f"is no address ({error})"
    if parts.scheme in ("http", "https"):
        return "" if re.fullmatch(r"[\w.-]+\.\w+(:\d+)?", parts.netloc) else "names no host"
    if parts.scheme == "mailto":
        return "" if "@" in parts.path else "names nobody"
    if parts.scheme or parts.netloc:
        return f"has the scheme {parts.scheme or '//'}"
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return "there is no such file"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
        return "there is no such anchor"
    return ""


def main() -> int:
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "build/site")
    found = problems(site)
    print("\n".join(found) or f"{len(list(site.rglob('*.html')))} pages, no broken link")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
