import tarfile

import pytest
from PIL import Image

from unclip.data.check import main


def test_the_report_counts_and_names_what_is_left_out(tmp_path, capsys):
    for name in ("a", "b", "c"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("one\ntwo")
    (tmp_path / "b.png").write_bytes(b"damaged")
    (tmp_path / "c.txt").unlink()
    (tmp_path / "d.svg").write_text("<svg/>")
    main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: 2 samples, 1 broken",
        "left out: 1 .svg files",
        f"broken: {tmp_path}/c.png: no caption",
    ]
    main([str(tmp_path), "--decode"])
    head, _, *broken = capsys.readouterr().out.splitlines()
    assert head == f"{tmp_path}: 1 samples with 2 captions, 2 broken"
    assert broken[1].startswith(f"broken: {tmp_path}/b.png: the image: not a readable image")
    with pytest.raises(SystemExit, match="error: no data at .*nowhere"):
        main([str(tmp_path / "nowhere")])


def test_images_next_to_a_tar_are_reported(tmp_path, capsys):
    for name in ("a", "b"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    with tarfile.open(tmp_path / "backup.tar", "w") as tar:
        for name in ("a.png", "a.txt"):
            tar.add(tmp_path / name, name)
    main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: 1 samples, 0 broken",
        "left out: 2 images outside the tar shards, which take precedence",
    ]
