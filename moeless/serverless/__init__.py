"""Expert copies as serverless function instances: which are in memory, since when, at what price."""

from typing import TYPE_CHECKING

from moeless import lazy

if TYPE_CHECKING:
    from moeless.serverless.keep_alive import KeepAlive as KeepAlive
    from moeless.serverless.pool import InstancePool as InstancePool
    from moeless.serverless.pool import PoolSettings as PoolSettings

__getattr__ = lazy.names(__name__, keep_alive="KeepAlive", pool="InstancePool PoolSettings")
