"""YAML of strangers to plain values, or one kind of error. Knows the grammar's traps, no content."""

from __future__ import annotations

from typing import Any


def load_yaml(text: str) -> Any:
    """Returns what a YAML text holds: lists, dicts, texts, numbers, dates.

    Tags of Python's objects are refused, and aliases of lists and mappings: a kilobyte of those can stand for gigabytes
    (merge keys copy what they name).

    Raises:
        ValueError: It is broken or refused; the message says where and why, on one line.
        ImportError: PyYAML is not installed.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                if not isinstance(self.anchors.get(event.anchor, yaml.ScalarNode), yaml.ScalarNode | type):
                    raise yaml.composer.ComposerError(
                        None, None, f"the alias *{event.anchor} of a list or mapping: write it out", event.start_mark
                    )
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # All but the first are what PyYAML lets through of a date, a number or a boolean that is not one.
        said = " ".join(str(error).split())
        raise ValueError(said[:300] or type(error).__name__) from None
