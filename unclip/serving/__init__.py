"""A server of OpenAI's Images API for any model that `unclip.load` reads."""
