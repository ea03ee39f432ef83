"""The networks, one file for each figure of a paper."""
