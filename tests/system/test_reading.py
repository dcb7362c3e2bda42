import os

import pytest

from opencoca.system.reading import open_ordinary, read_ordinary


def test_ordinary_files_are_read_whole_up_to_a_size(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_ordinary(path, 5) == b"12345"
    with pytest.raises(OSError, match="its 5 bytes are more than the 4 allowed"):
        read_ordinary(path, 4)
    (tmp_path / "link").symlink_to(path)
    assert read_ordinary(tmp_path / "link", 5) == b"12345"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_nothing_else_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null"):
        with pytest.raises(OSError, match="it is a pipe or a device, not an ordinary file"):
            open_ordinary(path)
    with pytest.raises(IsADirectoryError):
        open_ordinary(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_ordinary(tmp_path / "none")
