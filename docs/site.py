"""Hooks of ``mkdocs.yml``: pages of the repository's root, and links from docs/ to sources.

On the site a link to a file outside docs/ leads into the repository; one that leads to no file ends
the build.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/visistage/visistage/blob/main"
FROM_ROOT = {name.lower(): name for name in ("CONTRIBUTING.md", "CHANGELOG.md")}
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the root."""
    for name, source in FROM_ROOT.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page whose links outside docs/ lead into the repository."""
    here = ROOT if page.file.src_uri in FROM_ROOT else ROOT / "docs"

    def outside(link: re.Match) -> str:
        place = (here / link[1]).resolve()
        if not place.exists():
            raise PluginError(f"{page.file.src_uri} links to {link[1]}, which is not there")
        if place.is_relative_to(ROOT / "docs"):
            return f"]({place.relative_to(ROOT / 'docs').as_posix()}"
        return f"]({REPOSITORY}/{place.relative_to(ROOT).as_posix()}"

    return LINK.sub(outside, markdown)
