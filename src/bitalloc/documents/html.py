"""A document as one HTML file that asks for nothing else: pictures inside, no script, no font, no style from outside.

Its Content-Security-Policy forbids every request, so that a browser would refuse one that slipped in. The report that
Snakemake itself writes needs scripts, hides each figure behind a click and does not print.
"""

from __future__ import annotations

import base64
import re
import struct
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from bitalloc.documents import Bullets, Document, Grid, Picture
from bitalloc.errors import BitallocError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def render(document: Document, template: str) -> str:
    """`template` is Jinja and is given `document`; raises `BitallocError` for a picture that is no PNG."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"data_uri": data_uri, "size": size, "code": code, "slug": slug}
    environment.tests |= {
        name: lambda block, kind=kind: isinstance(block, kind)
        for name, kind in (("grid", Grid), ("picture", Picture), ("bullets", Bullets))
    }
    return environment.from_string(template).render(document=document)


def code(text: str) -> Markup:
    """Escaped, with `what stands in backticks` as code.

    >>> code("a < b in `x<y>`")
    Markup('a &lt; b in <code>x&lt;y&gt;</code>')
    """
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def slug(title: str) -> str:
    """
    >>> slug("What this stands on")
    'what-this-stands-on'
    """
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(_png(path)).decode()}"


def size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header: the page keeps its shape while pictures are decoded."""
    return struct.unpack(">II", _png(path)[16:24])


def _png(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BitallocError(f"cannot read the figure {path} ({error.strerror}); rerun, it is made again") from None
    if not data.startswith(_SIGNATURE):
        raise BitallocError(f"{path} is no PNG; delete it and rerun, it is made again")
    return data
