"""Files appear whole or not at all."""

import errno
import os
import stat
import subprocess
import sys

import pytest

from opencoca.system.files import WriteError, atomic_write, check_writable, clean_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_appears_in_a_new_folder(tmp_path):
    with atomic_write(tmp_path / "a" / "b" / "file.txt") as partial:
        partial.write_text("whole")
        assert names(tmp_path / "a" / "b") == [partial.name]
    assert names(tmp_path / "a" / "b") == ["file.txt"]
    assert (tmp_path / "a" / "b" / "file.txt").read_text() == "whole"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error):
    file = tmp_path / "file.txt"
    file.write_text("old")

    def write_half():
        with atomic_write(file) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert names(tmp_path) == ["file.txt"]
    assert file.read_text() == "old"


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path):
    """A real failure of the system, in another process: no file may grow over 4 kB there."""
    file = tmp_path / "file.txt"
    file.write_text("old")
    code = (
        "import resource, sys; from opencoca.system.files import atomic_write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "with atomic_write(sys.argv[1]) as partial: partial.write_bytes(bytes(100_000))\n"
    )
    result = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=False)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("opencoca.system.files.WriteError: cannot write")
    assert str(file) in last
    assert "free some space" in last
    assert names(tmp_path) == ["file.txt"]
    assert file.read_text() == "old"


def test_the_error_keeps_the_number_and_is_one_sentence(tmp_path):
    with pytest.raises(WriteError, match="free some space") as caught, atomic_write(tmp_path / "file.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'file.txt'} (No space left on device)")
    assert "\n" not in str(caught.value)


def test_a_folder_or_a_device_is_not_replaced(tmp_path):
    for path in (tmp_path, "/dev/null"):
        with pytest.raises(WriteError, match="not an ordinary file"), atomic_write(path):
            pytest.fail("the block must not run")
    assert not os.path.isfile("/dev/null")


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(WriteError, match="part of its path is a file"), atomic_write(tmp_path / "file" / "inner.txt"):
        pytest.fail("the block must not run")


def test_a_link_goes_on_pointing_to_the_file(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with atomic_write(tmp_path / "link.txt") as partial:
        partial.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(WriteError, match="cannot write"), atomic_write(tmp_path / "file.txt"):
        pass
    assert names(tmp_path) == []


@pytest.fixture
def umask():
    """Sets the umask until the test ends."""
    before = os.umask(0)
    yield os.umask
    os.umask(before)


def replace_privately(partial):
    """What safetensors does: the file is a temporary one's, made for nobody else to read."""
    other = partial.with_suffix(".other")
    os.close(os.open(other, os.O_CREAT | os.O_WRONLY, 0o600))
    other.replace(partial)


@pytest.mark.skipif(os.name != "posix", reason="permissions of this kind exist on POSIX systems")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002, 0o077])
@pytest.mark.parametrize("write", [lambda partial: partial.write_text("new"), replace_privately])
def test_a_new_file_has_the_permissions_of_the_umask(tmp_path, umask, mask, write):
    umask(mask)
    with atomic_write(tmp_path / "file") as partial:
        write(partial)
    (tmp_path / "plain").write_text("plain")
    assert mode(tmp_path / "file") == mode(tmp_path / "plain") == 0o666 & ~mask


@pytest.mark.skipif(os.name != "posix", reason="permissions of this kind exist on POSIX systems")
@pytest.mark.parametrize("write", [lambda partial: partial.write_text("new"), replace_privately])
def test_a_replaced_file_keeps_its_permissions(tmp_path, umask, write):
    umask(0o022)
    (tmp_path / "file").write_text("old")
    for kept in (0o600, 0o664, 0o444):
        (tmp_path / "file").chmod(kept)
        with atomic_write(tmp_path / "file") as partial:
            write(partial)
        assert mode(tmp_path / "file") == kept


def test_what_a_killed_process_of_the_same_number_left_does_no_harm(tmp_path):
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "file") as partial:
        raise RuntimeError
    partial.write_text("left")
    partial.chmod(0o400)
    with atomic_write(tmp_path / "file") as again:
        assert again == partial
        again.write_text("new")
    (tmp_path / "plain").write_text("plain")
    assert names(tmp_path) == ["file", "plain"]
    assert mode(tmp_path / "file") == mode(tmp_path / "plain")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path):
    code = (
        "import os, sys; from opencoca.system.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as partial: partial.write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "file"], check=False)
    (left,) = names(tmp_path)
    (tmp_path / ".0123456789ab.00000000-999999999-1.partial").touch()  # of another machine: it may be at work
    with atomic_write(tmp_path / "another") as mine:
        mine.write_text("whole")
    assert left not in names(tmp_path)
    assert names(tmp_path) == [".0123456789ab.00000000-999999999-1.partial", "another"]


def test_what_a_running_process_writes_is_left_alone(tmp_path):
    with atomic_write(tmp_path / "one") as one:
        one.write_text("1")
        clean_folder.cache_clear()
        with atomic_write(tmp_path / "two") as two:
            two.write_text("2")
    assert names(tmp_path) == ["one", "two"]


def test_the_longest_name_can_be_written(tmp_path):
    target = tmp_path / ("x" * 255)
    with atomic_write(target) as partial:
        partial.write_text("whole")
    assert target.read_text() == "whole"


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_what_cannot_be_written_is_found_beforehand(tmp_path, kind):
    path = tmp_path / "out"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(ValueError, match="it is a folder" if kind == "folder" else "not an ordinary file"):
        check_writable(path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="part of its path is a file"):
        check_writable(None, tmp_path / "file" / "inner")
    check_writable(tmp_path / "new" / "folder" / "out")
    assert not (tmp_path / "new").exists()
