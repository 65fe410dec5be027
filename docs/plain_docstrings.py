"""Docstrings are written to be read as they stand; this makes reStructuredText of them, before napoleon sees them.

Indented paragraphs, which hold formulas and tables, become literal blocks; what would be markup outside backticks is
escaped; `doi:` and `arXiv:` become links. Members without a docstring of their own are left out, also those for which
Python makes one up.
"""

import re
from urllib.parse import quote

SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Attributes|Class attributes|Example|Examples|References|Note):$")
LINK = re.compile(r"\b(doi|arXiv):(10\.\S+[\w)]|\d{4}\.\d{4,5})")
HOSTS = {"doi": "https://doi.org/", "arXiv": "https://arxiv.org/abs/"}


def setup(app):
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True}


def process(app, what, name, obj, options, lines):
    lines[:] = convert(lines)


def skip(app, what, name, obj, is_skipped, options):
    is_field = (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
    return True if is_field or (isinstance(obj, property) and not obj.fget.__doc__) else None


def convert(lines: list[str]) -> list[str]:
    converted: list[str] = []
    base = 0  # indentation of ordinary text here
    section = None  # the heading that we are under
    literal = None  # indentation of the literal block that we are in
    for line in lines:
        indent = len(line) - len(line.lstrip())
        after_blank = not converted or not converted[-1].strip()
        if not line.strip():
            converted.append("")
            continue
        if literal is not None and indent >= literal:
            converted.append(line)
            continue
        literal = None
        if indent == 0:
            section = SECTION.match(line)
            base = 4 if section else 0
        elif section and section[1] == "References" and not after_blank:
            line, indent = " " * base + line.lstrip(), base  # a reference that runs on over two lines
        is_example = line.lstrip().startswith((">>>", "..."))
        if after_blank and indent >= base + 4 and not is_example:
            literal = indent
            converted += [" " * base + "::", "", line]
        else:
            converted.append(line if is_example else inline(line))
    return converted


def inline(line: str) -> str:
    """Escapes markup outside backticks, and links references."""
    parts = re.split(r"(`[^`]*`)", line)
    for i in range(0, len(parts), 2):
        text = (
            parts[i] if re.match(r"\s*\*{1,2}\w+:", parts[i]) else re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", parts[i])
        )
        parts[i] = LINK.sub(link, text)
    return "".join(parts)


def link(match: re.Match) -> str:
    """A link to a reference; older identifiers have angle brackets, which would end it."""
    text = re.sub("([<>])", r"\\\1", match[0])
    return f"`{text} <{HOSTS[match[1]]}{quote(match[2], safe='/:;()')}>`__"
