"""Attention: what a layer needs of it, the backends that can compute it, and which of them does."""

from train.model.attention.backend import Needs
from train.model.attention.cached import CachedView, attend_cached, view_of_cache, view_of_ragged_cache
from train.model.attention.choice import BACKENDS, Attend, choose, obstacle

__all__ = [
    "BACKENDS",
    "Attend",
    "CachedView",
    "Needs",
    "attend_cached",
    "choose",
    "obstacle",
    "view_of_cache",
    "view_of_ragged_cache",
]
