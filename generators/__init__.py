"""Synthetic data: generators, the actor pool that samples them, the cache of what they made."""
