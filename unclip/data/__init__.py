"""Pictures and captions: where they come from (emoji, folders, tar shards, embeddings) and how batches are made."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Augment": "loader",
    "DataConfig": "loader",
    "Loader": "loader",
    "open_dataset": "loader",
    "Dataset": "samples",
    "Sample": "samples",
    "FolderDataset": "folder",
    "ShardDataset": "shards",
    "ShardWriter": "shards",
    "CodeDataset": "codes",
    "EmbeddingDataset": "embeddings",
    "EmbeddingWriter": "embeddings",
    "CorruptionConfig": "corruption",
    "corrupt": "corruption",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Public names are imported on first use: rendering emoji needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
