"""Galleries of images that are encoded once and searched by text or by image."""

from .index import RetrievalIndex

__all__ = ["RetrievalIndex"]
