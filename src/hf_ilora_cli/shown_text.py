"""Escapes foreign text (titles, names, messages) so that it controls neither a terminal nor a document.

A model from the Hub brings its own catalogue: its text passes through here before it is printed, logged or written to
Markdown.
"""

import json
import re
import shlex
import unicodedata
from collections.abc import Sequence
from pathlib import Path

# Control characters, those that reorder or hide text, surrogates, and line separators. Persian, Indian languages and
# emoji need the two joiners.
_HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"
_MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\`*[]|$~"} | {"<": "&lt;", ">": "&gt;"})
_ENTITY = re.compile(r"&(?=#?\w+;)")
# The beginning of an absolute path. Inside a text, it does not follow characters of a relative path or an address.
_ROOT = r"(?:file:/+|~[\w.-]*[/\\]|[A-Za-z]:[\\/]|\\\\|/)"
_WHOLE_PATH = re.compile(rf"(-{{1,2}}[\w-]+=)?({_ROOT}.*)", re.DOTALL)
_PATH_INSIDE = re.compile(rf"(?<![\w.:/\\~-]){_ROOT}[^\s\"',;]+")
_ADDRESS = re.compile(r"(\w+://)(?:[^\s/@]*@)?([^\s?#\"']*)(?:[?#][^\s\"']*)?")
_EMPHASIS = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # not inside a word


def shown(text: object) -> str:
    """The text in one line, with its control characters as Python spells them, such as \\x1b and \\n."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(_escape(character) if _is_hidden(character) else character for character in text)


def shown_lines(text: str) -> str:
    """The same for text of several lines."""
    return "\n".join("\t".join(map(shown, line.split("\t"))) for line in text.split("\n"))


def in_markdown(text: object) -> str:
    """The text in one line that Markdown, in a table or outside, shows as it is: no HTML, link, code or formula."""
    return _EMPHASIS.sub(r"\_", _ENTITY.sub("&amp;", shown(text)).translate(_MARKDOWN))


def code_in_markdown(text: object) -> str:
    """The text in one line as code in Markdown."""
    text = shown(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def in_figure(text: object) -> str:
    """The text in one line that matplotlib draws as it is: it reads a formula between two dollar signs."""
    return shown(text).replace("$", r"\$")


def shareable(word: str) -> str:
    """A name, or a word of a command, that is safe to publish: an absolute path becomes its last part, and an address
    loses its user and its query, which may be a signature."""
    whole = _WHOLE_PATH.fullmatch(word)
    if whole:
        return (whole[1] or "") + _last_part(whole[2])
    return _PATH_INSIDE.sub(lambda path: _last_part(path[0]), _ADDRESS.sub(r"\1\2", word))


def shareable_command(words: Sequence[str]) -> str:
    """The words of a command as one line of a shell, each as `shareable` makes it."""
    return shown(shlex.join(map(shareable, words)))


def shareable_values(value: object) -> object:
    """A JSON value that is safe to publish: every text in it, keys included, as `shareable` makes it."""
    if isinstance(value, dict):
        return {shareable(key): shareable_values(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shareable_values(each) for each in value]
    return shareable(value) if isinstance(value, str) else value


def shareable_json(path: Path) -> bytes:
    """The content of a JSON file as `shareable_values` makes it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return (json.dumps(shareable_values(content), indent=2, ensure_ascii=False) + "\n").encode()


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "PATH"


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN_CATEGORIES and character not in _JOINERS


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
