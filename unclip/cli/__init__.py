"""Command line of unclip: `unclip generate`, `unclip vary`, `unclip bench`, ..."""

from unclip.cli.main import main as main
