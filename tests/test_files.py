"""Files that are written atomically."""

from __future__ import annotations

import pytest

from unclip.files import atomic_file


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with atomic_file(target) as first, atomic_file(target) as second:  # threads, or machines
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"  # which ends last
    with pytest.raises(ValueError), atomic_file(target) as part:
        part.write_text("half")
        raise ValueError
    assert target.read_text() == "first" and list(target.parent.iterdir()) == [target]
