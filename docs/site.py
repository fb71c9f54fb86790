"""Adds the pages of the site whose sources are elsewhere in the repository (a hook that mkdocs.yml names).

The home page is README.md; the reference is made from the public names and the help texts of the commands. Links in the
pages work in the repository; on the site they lead to its pages, and links to source files become text.
"""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PROJECT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    ".github/CONTRIBUTING.md": "contributing.md",
    ".github/SECURITY.md": "security.md",
}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"(```.*?```)", re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    contents = {page: (PROJECT / source).read_text(encoding="utf-8") for source, page in PAGES.items()}
    contents |= {f"reference/{name}.md": text for name, text in reference_pages().items()}
    for name, content in contents.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page for the site."""
    sources = {page: source for source, page in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = _CODE.split(markdown)  # text, code, text, ...
    return "".join(
        part if place % 2 else _LINK.sub(lambda link: site_link(link, source, page.file.src_uri), part)
        for place, part in enumerate(parts)
    )


def site_link(link: re.Match, source: str, page: str) -> str:
    """A link of the file `source`, rewritten for the page."""
    text, target, anchor = link[1], link[2], link[3] or ""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path not in PAGES and (not path.startswith("docs/") or path.endswith(".ipynb")):
        return text
    name = PAGES.get(path, path.removeprefix("docs/"))
    return f"[{text}]({posixpath.relpath(name, posixpath.dirname(page) or '.')}{anchor})"


def reference_pages() -> dict[str, str]:
    """Name -> text of the pages of the reference: one for each room with public names, and one for the commands."""
    stub = ast.parse((PROJECT / "src" / "hf_ilora" / "__init__.pyi").read_text(encoding="utf-8"))
    rooms: dict[str, list[str]] = {}
    for statement in stub.body:
        if isinstance(statement, ast.ImportFrom) and statement.module:
            room = statement.module.split(".")[1:-1][-1]  # models.ilora and models.next_item are two
            rooms.setdefault(room, []).extend(f"{statement.module}.{each.name}" for each in statement.names)
    pages = {}
    for room, names in rooms.items():
        listed = ", ".join(
            f"[`{name}`](#{path})" for path, name in sorted((each, each.split(".")[-1]) for each in names)
        )
        blocks = "\n\n".join(f"::: {path}" for path in names)
        pages[room] = f"# hf_ilora: {room}\n\nImport these names from `hf_ilora`: {listed}.\n\n{blocks}\n"
    helps = sorted((PROJECT / "src" / "hf_ilora_cli" / "help").glob("*.txt"))
    texts = [(path.stem, path.read_text(encoding="utf-8").strip()) for path in helps]
    pages["commands"] = "# Commands\n\nThe output of `hf-ilora COMMAND --help`, by recipe.\n\n" + "\n\n".join(
        f"## {name}\n\n```text\n{text}\n```" for name, text in texts
    )
    return pages
