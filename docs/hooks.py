"""Lets pages of the site link to files beside docs/, as they do where the repository is read.

A link such as `../plans/wavelet_gpt.md` leads out of docs/. Every file that a page links to so is
taken into the site at its path in the repository, pages as pages, and the link is turned to it.
What does not exist is left as it is, for `mkdocs build --strict` to complain of.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\(\s*)([^)\s#:]+)(#[^)\s]*)?(\s*\))")
MORE = ["CONTRIBUTING.md", "CHANGELOG.md", "plans/README.md"]  # pages of the menu


def place(target: str, folder: str) -> str | None:
    """Where in the repository a link of a page in `folder` leads, if a file is there."""
    path = posixpath.normpath(posixpath.join(folder, target))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def in_site(path: str) -> str:
    """The place in the site of a file of the repository."""
    return path.removeprefix("docs/")


def on_files(files, config):
    """Take in the linked files, and those that their pages link to."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting, seen = [*pages, *MORE], set(pages)
    while waiting:
        path = waiting.pop()
        if path not in seen and not path.startswith("docs/"):
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        seen.add(path)
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            targets = (place(match[2], posixpath.dirname(path)) for match in LINK.finditer(text))
            waiting += [target for target in targets if target and target not in seen]
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links to files of the repository to their places in the site."""
    name = page.file.src_uri
    source = name if files.get_file_from_path(name).generated_by else f"docs/{name}"
    here = posixpath.dirname(name)

    def turned(match):
        path = place(match[2], posixpath.dirname(source))
        if path is None:
            return match[0]
        target = posixpath.relpath(in_site(path), here or ".")
        return f"{match[1]}{target}{match[3] or ''}{match[4]}"

    return LINK.sub(turned, markdown)
