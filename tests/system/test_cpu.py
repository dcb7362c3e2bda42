"""What the processor says of itself."""

import pytest

from opencoca.system import cpu


@pytest.mark.parametrize(
    ("text", "vendor"),
    [("processor\t: 0\nvendor_id\t: AuthenticAMD\nvendor_id\t: X\n", "AuthenticAMD"), ("Features : neon\n", "")],
)
def test_the_processors_maker(tmp_path, monkeypatch, text, vendor):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "_CPU_INFO", tmp_path / "cpuinfo")
    assert cpu.cpu_vendor() == vendor
    (tmp_path / "cpuinfo").unlink()
    assert cpu.cpu_vendor() == ""
    identifier = "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD"
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", identifier)
    monkeypatch.setattr(cpu, "_IS_WINDOWS", True)
    assert cpu.cpu_vendor() == "AuthenticAMD"


@pytest.fixture
def eight_processors(tmp_path, monkeypatch):
    """Sets how many threads can run here, and forgets the number that tests use."""
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cpu.os, "cpu_count", lambda: 8)
    for name in ("_CGROUP_V2", "_CGROUP_V1", "_LOAD"):
        monkeypatch.setattr(cpu, name, tmp_path / name)
    monkeypatch.setattr(cpu, "_LOAD_INTERVAL_S", 0)
    for name in cpu._THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = cpu.torch.get_num_threads()
    cpu.torch.set_num_threads(8)
    yield tmp_path
    cpu.torch.set_num_threads(before)


@pytest.mark.parametrize(("runnable", "threads"), [(1, 8), (4, 5), (8, 1), (60, 1)])
def test_as_many_threads_as_processors_are_free(eight_processors, runnable, threads):
    (eight_processors / "_LOAD").write_text(f"99.0 99.0 99.0 {runnable}/321 4711\n")
    line = cpu.limit_threads()
    assert cpu.torch.get_num_threads() == threads
    assert (line is None) == (threads == 8)
    if line:
        assert line.startswith(f"{threads} of 8 threads")
        assert cpu.limit_threads() is None  # it is said once


def test_a_control_groups_quota_counts(eight_processors):
    (eight_processors / "_LOAD").write_text("0 0 0 1/3 4711\n")
    (eight_processors / "_CGROUP_V2").write_text("max 100000\n")
    assert cpu.free_processors() == 8
    (eight_processors / "_CGROUP_V2").write_text("250000 100000\n")
    assert cpu.free_processors() == 2
    (eight_processors / "_CGROUP_V2").unlink()
    (eight_processors / "_CGROUP_V1").mkdir()
    (eight_processors / "_CGROUP_V1" / "cpu.cfs_quota_us").write_text("300000\n")
    (eight_processors / "_CGROUP_V1" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu.free_processors() == 3


def test_the_users_number_of_threads_stays(eight_processors, monkeypatch):
    (eight_processors / "_LOAD").write_text("0 0 0 9/30 4711\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert cpu.limit_threads() is None
    assert cpu.torch.get_num_threads() == 8
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cpu.limit_threads(wanted=6) is None  # a run goes on as it began, however busy it is
    assert cpu.torch.get_num_threads() == 6


def test_a_moment_of_work_elsewhere_does_not_count(eight_processors, monkeypatch):
    class Load:
        samples = iter([9, 9, 3, 9])

        def read_text(self) -> str:
            return f"0 0 0 {next(self.samples)}/30 4711"

    monkeypatch.setattr(cpu, "_LOAD", Load())
    assert cpu.free_processors() == 6
