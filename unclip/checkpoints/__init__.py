"""Model folders: ours, and one file for each foreign format."""
