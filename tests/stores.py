"""Adapters through a store and back, for tests of whatever makes adapters."""

from minipeft.models.loading import Origin
from minipeft.store import Store


def through_a_store(folder, adapters, base):
    """What another process would read. A base that was made in memory is given a name."""
    base.origin = base.origin or Origin(folder, "base", base)
    Store.make(folder, base).add_many(adapters, base)
    return Store(folder).get_many([adapter.user for adapter in adapters], base)
