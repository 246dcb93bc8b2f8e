"""Elements of SVG, made by hand: text in, text out.

Nothing here has an id and nothing refers to another element, so any number of charts
may stand on a page. Colours are the page's; see ``templates/style.css``.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

WIDTH = 340
"""Of a chart, in units that are pixels on a small phone."""
FONT = 12
"""Size of all text in a chart."""
_NARROW, _WIDE = "fijl.,:;!'|()[] ", "mwMWOQ@%—→×"
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]"
)
"""Characters that no page may hold, or that turn the text around them."""
_CAMEL = {"view_box": "viewBox"}


def clean(text: object) -> str:
    """Return text without characters that are no text."""
    return _CONTROL.sub("\ufffd", str(text))


def element(tag: str, *body: object, **attributes: object) -> Markup:
    """Return an element; what is in it is escaped, unless it is markup.

    Args:
        tag: its name.
        body: elements or text in it.
        attributes: with _ for -, and a _ after ``class``; None is left out.
    """
    out = Markup().join(
        Markup(' {}="{}"').format(
            _CAMEL.get(name, name.rstrip("_").replace("_", "-")), _value(value)
        )
        for name, value in attributes.items()
        if value is not None
    )
    inside = Markup().join(
        one if isinstance(one, Markup) else clean(one) for one in body
    )
    return Markup("<{}{}>{}</{}>").format(Markup(tag), out, inside, Markup(tag))


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return clean(value)


def chart(
    height: float, title: str, said: str, *parts: object, width: float = WIDTH
) -> Markup:
    """Return a chart that is as wide as what holds it, or scrolls where it is wider.

    Args:
        height: in units.
        title: its name, for readers who do not see it.
        said: what it shows, in words.
        parts: of it.
        width: in units.
    """
    return element(
        "svg",
        element("title", title),
        element("desc", said),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        class_="chart",
        view_box=f"0 0 {width:.0f} {height:.0f}",
        role="img",
        style=f"min-width:{width:.0f}px" if width > WIDTH + 1 else None,
    )


def label(
    x: float, y: float, text: object, anchor: str = "start", kind: str | None = None
) -> Markup:
    """Return a line of text; ``y`` is its base line."""
    at = None if anchor == "start" else anchor
    return element("text", text, x=x, y=y, text_anchor=at, class_=kind)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """Return a line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def path(points: Iterable[str], kind: str) -> Markup:
    """Return a path of commands."""
    return element("path", d="".join(points), class_=kind)


def number(value: float) -> str:
    """Return a coordinate as short text."""
    return f"{value:.1f}".removesuffix(".0")


def box(
    x: float, y: float, width: float, height: float, kind: str, **more: object
) -> Markup:
    """Return a rectangle."""
    return element("rect", x=x, y=y, width=width, height=height, class_=kind, **more)


def hatch(x: float, y: float, width: float, height: float, apart: float = 5) -> Markup:
    """Return diagonal lines within a rectangle.

    A pattern would need an id, and printers turn patterns into pictures.
    """
    commands = []
    start = apart / 2
    while start < width + height:
        # From the left or lower side up to the upper or right one.
        left = max(0.0, start - height)
        right = min(start, width)
        commands.append(
            f"M{number(x + left)} {number(y + min(start, height))}"
            f"L{number(x + right)} {number(y + start - right)}"
        )
        start += apart
    return path(commands, "hatch")


def text_width(text: str, size: float = FONT) -> float:
    """Return about how wide a text is at most, in units."""

    def of(char: str) -> float:
        if unicodedata.east_asian_width(char) in "WF":
            return 1.05
        if unicodedata.combining(char):
            return 0.0
        if char in _NARROW:
            return 0.39
        if char in _WIDE:
            return 1.0
        return 0.72 if char.isupper() else 0.64

    return size * sum(map(of, clean(text)))


def shortened(text: str, width: float) -> str:
    """Return a text that fits a width, its end cut off if need be."""
    text = clean(text)
    if text_width(text) <= width:
        return text
    left = width - text_width("…")
    for end in range(len(text)):
        left -= text_width(text[end])
        if left < 0:
            return text[:end].rstrip() + "…"
    return text


def spread(values: Sequence[float], most: int) -> list[int]:
    """Return the indices of at most ``most`` values, evenly, both ends among them."""
    count = len(values)
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def name_with_title(x: float, y: float, name: str, width: float) -> Markup:
    """Return a name in a width; all of it is in its tooltip."""
    short = shortened(name, width)
    if short == clean(name):
        return label(x, y, short)
    return element("text", element("title", name), escape(short), x=x, y=y)
