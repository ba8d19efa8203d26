"""The adapters in a service's record: reads, adds, replaces and removes them. Knows the record, no files and no engine."""

from __future__ import annotations

from collections.abc import Callable

from palate.runs.record import ADAPTER_COPIES, ADAPTERS_KEY, Record
from palate_recipes.errors import ConfigurationError, DamagedFilesError
from palate_recipes.specs.adapters import ADAPTERS_LIMIT_BYTES, Adapters, ServedAdapter
from palate_recipes.specs.codec import decode, encode
from palate_recipes.specs.fleet import ADAPTERS_LIMIT


def read_adapters(record: Record) -> tuple[ServedAdapter, ...]:
    """Returns the adapters. Raises DamagedFilesError if they cannot be read."""
    return parse_adapters(record, adapters_bytes(record))


def adapters_bytes(record: Record) -> bytes:
    """Returns the list as it is stored, b"" if there is none. One request."""
    return record.listed(ADAPTERS_KEY, limit_bytes=ADAPTERS_LIMIT_BYTES)


def parse_adapters(record: Record, data: bytes) -> tuple[ServedAdapter, ...]:
    """Returns the adapters in `adapters_bytes`. Raises DamagedFilesError."""
    try:
        if len(data) > ADAPTERS_LIMIT_BYTES:
            raise ValueError(f"it has more than {ADAPTERS_LIMIT_BYTES} bytes")
        adapters = decode(data, Adapters).adapters if data else ()
        if len({one.name for one in adapters}) < len(adapters):
            raise ValueError("two adapters have the same name")
    except ValueError as error:
        raise DamagedFilesError(
            f"{ADAPTERS_KEY} of {record.name} is damaged ({error}): restore {record.uri}/{ADAPTERS_KEY}, or delete that file, "
            "which removes all adapters"
        ) from None
    return adapters


def add(record: Record, adapter: ServedAdapter, *, replace: bool) -> ServedAdapter | None:
    """Adds an adapter. Returns the one that had its name before. If that has the same files at the same place, nothing changes.

    Raises:
        ConfigurationError: The name is another adapter's and `replace` is False, or the service has too many adapters.
    """
    before: list[ServedAdapter | None] = []

    def change(adapters: tuple[ServedAdapter, ...]) -> tuple[ServedAdapter, ...]:
        known = next((one for one in adapters if one.name == adapter.name), None)
        before.append(known)
        if known is None:
            if len(adapters) >= ADAPTERS_LIMIT:
                raise ConfigurationError(
                    f"service {record.name} has {ADAPTERS_LIMIT} adapters, the maximum: remove one first"
                )
            return (*adapters, adapter)
        if (known.digest, known.uri) == (adapter.digest, adapter.uri):
            return adapters
        if not replace and known.digest != adapter.digest:
            source = f"job {known.job}" if known.job else known.uri
            raise ConfigurationError(
                f"service {record.name} has an adapter {adapter.name!r} already, of {source}: choose another name, or replace it "
                "with replace=True"
            )
        return tuple(adapter if one is known else one for one in adapters)

    _rewrite(record, change)
    return before[-1]


def remove(record: Record, name: str) -> ServedAdapter:
    """Removes an adapter and returns its entry. Raises ConfigurationError if there is none of this name."""
    removed: list[ServedAdapter] = []

    def change(adapters: tuple[ServedAdapter, ...]) -> tuple[ServedAdapter, ...]:
        found = next((one for one in adapters if one.name == name), None)
        if found is None:
            known = ", ".join(one.name for one in adapters) or "none"
            raise ConfigurationError(f"service {record.name} has no adapter {name!r}. It has: {known}")
        removed.append(found)
        return tuple(one for one in adapters if one is not found)

    _rewrite(record, change)
    return removed[-1]


def take_back(record: Record, adapter: ServedAdapter, before: ServedAdapter | None) -> bool:
    """Undoes `add`. Returns False, without a change, if the record no longer has exactly this adapter.

    Args:
        record: The service.
        adapter: What was added.
        before: What it replaced.
    """
    found: list[bool] = []

    def change(adapters: tuple[ServedAdapter, ...]) -> tuple[ServedAdapter, ...]:
        found.append(adapter in adapters)
        replaced = [before if one == adapter else one for one in adapters]
        return tuple(one for one in replaced if one is not None)

    _rewrite(record, change)
    return found[-1]


def forget_adapters(record: Record) -> None:
    """Removes all adapters."""
    record.store.delete(record.key(ADAPTERS_KEY))
    record.store.delete_tree(record.key(ADAPTER_COPIES))


def _rewrite(record: Record, change: Callable[[tuple[ServedAdapter, ...]], tuple[ServedAdapter, ...]]) -> None:
    record.change_listed(
        ADAPTERS_KEY,
        lambda data: encode(Adapters(adapters=change(parse_adapters(record, data)))),
        limit_bytes=ADAPTERS_LIMIT_BYTES,
    )
