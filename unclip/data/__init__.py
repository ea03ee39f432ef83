"""Pictures and captions: where they come from (emoji, folders, tar shards, embeddings) and how batches are made."""
