"""The renewed time to live in a service's record. Knows the record, no runner and no clock."""

from __future__ import annotations

from secrets import token_hex

from palate.runs.record import RENEWAL_KEY, Record
from palate_recipes.errors import ConfigurationError, DamagedFilesError
from palate_recipes.specs.codec import decode, encode, shown
from palate_recipes.specs.run import LONGEST_LIFE_S, Renewal

_LIMIT_BYTES = 4096


def read_renewal(record: Record) -> Renewal | None:
    """Returns the last renewal; None if there was none. Raises DamagedFilesError if it cannot be read."""
    try:
        data = record.store.get_range(record.key(RENEWAL_KEY), 0, _LIMIT_BYTES)
    except FileNotFoundError:
        return None
    try:
        return decode(data, Renewal)
    except ValueError as error:
        raise DamagedFilesError(
            f"{RENEWAL_KEY} of {record.name} is damaged ({error}): renew the service again (`palate renew {record.name} 2h`), or "
            f"delete {record.uri}/{RENEWAL_KEY}, which brings back the time to live of the deploy"
        ) from None


def write_renewal(record: Record, time_to_live_s: float | None) -> Renewal:
    """Writes a renewal and returns it. Of several at the same time the last one counts.

    Raises:
        ConfigurationError: The time is out of range.
    """
    if time_to_live_s is not None and not (
        isinstance(time_to_live_s, int | float)
        and not isinstance(time_to_live_s, bool)
        and 0 < time_to_live_s <= LONGEST_LIFE_S
    ):
        raise ConfigurationError(
            f"time_to_live_s={shown(time_to_live_s)} is out of range: expected seconds above 0, at most {LONGEST_LIFE_S:.0f} "
            "(10 years). None removes the limit"
        )
    renewal = Renewal(id=token_hex(8), time_to_live_s=None if time_to_live_s is None else float(time_to_live_s))
    record.store.put(record.key(RENEWAL_KEY), encode(renewal))
    return renewal


def forget_renewal(record: Record) -> None:
    """Brings back the time to live of the manifest."""
    record.store.delete(record.key(RENEWAL_KEY))
