"""What every HTML output for a notebook must keep to."""

from __future__ import annotations

from xml.etree import ElementTree


def check_html(html: str) -> ElementTree.Element:
    """Parses it as XML, which is stricter than a browser; asserts that nothing in it acts or loads or is typeset as TeX."""
    root = ElementTree.fromstring(f"<x>{html}</x>")
    (block,) = root
    assert block.get("class") == "tex2jax_ignore mathjax_ignore"
    assert not root.text
    assert not block.tail
    for element in root.iter():
        assert element.tag not in ("script", "img", "iframe", "link", "object", "style")
        assert not any(name.startswith("on") or name in ("href", "src") for name in element.attrib)
    return root
