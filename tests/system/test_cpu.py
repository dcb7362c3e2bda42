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
