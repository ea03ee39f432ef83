"""Structured logs: one JSON object a line, without prompts and keys."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JSONFormatter(logging.Formatter):
    """Formats the message, and what was given as `extra`, as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        milliseconds = f"{record.msecs:03.0f}"
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{stamp}.{milliseconds}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        entry |= {key: value for key, value in vars(record).items() if key not in STANDARD}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure_logs() -> None:
    """Write the server's logs to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter())
    for name in ("unclip.serving", "uvicorn.error", "python_multipart"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "unclip.serving" else logging.ERROR)


def log_warning(message: Warning | str, *_: object) -> None:
    """Write a Python warning to the server's logs; used as `warnings.showwarning`."""
    logging.getLogger("unclip.serving").warning("warning", extra={"text": str(message)})
