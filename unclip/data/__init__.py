"""Captioned images, embeddings and image codes: readers, writers and a resumable batch loader."""
