"""What this machine allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from unbroken.host import UNLIMITED, available_cores, cpu_quota


@pytest.mark.parametrize(
    ("cgroup", "files", "allowed"),
    [
        ("0::/pod/box\n", {"pod/box/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000\n", "pod/cpu.max": "400000 100000\n"}, 4.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, UNLIMITED),
        ("4:cpu,cpuacct:/box\n", {"cpu/box/cpu.cfs_quota_us": "50000\n", "cpu/box/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("4:cpu:/box\n", {"cpu/box/cpu.cfs_quota_us": "-1\n", "cpu/box/cpu.cfs_period_us": "100000\n"}, UNLIMITED),
        ("0::/../other\n", {}, UNLIMITED),
        ("4:memory:/box\n", {"box/cpu.max": "100000 100000\n"}, UNLIMITED),
    ],
)
def test_the_quota_of_a_container_counts(tmp_path: Path, cgroup: str, files: dict[str, str], allowed: float) -> None:
    (tmp_path / "cgroup").write_text(cgroup)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "fs") == allowed
    assert available_cores() >= 1
