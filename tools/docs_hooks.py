"""What MkDocs calls while it builds the pages: see mkdocs.yml."""

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text, with links that leave docs/ turned into paths.

    In the repository such a link leads to a file; the site has the pages only.
    """
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def path_of(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link["target"]))
        if path.startswith("docs/"):
            return link[0]
        return f"{link['text']} (`{path}`)"

    return _LINK.sub(path_of, markdown)
