"""Files that are written atomically."""

from __future__ import annotations

import pytest

from unclip.files import atomic_file, check_file


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


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_is_written_through(tmp_path, exists):
    target, link = tmp_path / "target" / "a.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    if exists:
        target.write_text("old")
    link.symlink_to("target/a.txt")
    with atomic_file(link) as part:
        part.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_a_link_to_where_nothing_can_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    link = tmp_path / "link.txt"
    link.symlink_to("file/a.txt")
    with pytest.raises(ValueError, match="link.txt: .*file is not a directory"):
        check_file(link)
