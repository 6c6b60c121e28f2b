"""Expert copies as serverless function instances: which are in memory, since when, at what price."""

from moeless.serverless.keep_alive import KeepAlive
from moeless.serverless.pool import InstancePool, PoolSettings

__all__ = ["InstancePool", "KeepAlive", "PoolSettings"]
