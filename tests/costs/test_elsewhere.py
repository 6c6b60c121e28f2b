"""Times that were measured on another processor are used, and the reader is told."""

from __future__ import annotations

import pytest

from moeless.costs import profile as profiles
from moeless.costs.profile import HardwareProfile
from moeless.costs.profile_reader import load_profile


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> HardwareProfile:
    """The profile that the package brings, on the machine that it was made on."""
    found = load_profile("cpu-bundled")
    monkeypatch.setattr(profiles, "processor_name", lambda: found.device)
    monkeypatch.setattr(profiles, "cores", lambda: found.document["machine"]["host_cores"])
    return found


def test_the_machine_that_was_measured_needs_no_remark(shipped: HardwareProfile) -> None:
    assert shipped.elsewhere() is None


def test_another_processor_is_named_with_the_way_to_measure_it(
    shipped: HardwareProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "processor_name", lambda: "Another 9000")
    said = shipped.elsewhere()
    assert said is not None
    for part in (shipped.device, "this machine has Another 9000", "moeless profile --model bundled", "measured:FILE"):
        assert part in said


def test_another_number_of_cores_is_told(shipped: HardwareProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "cores", lambda: 64)
    said = shipped.elsewhere()
    assert said is not None
    assert "this process may use 64" in said


def test_times_of_a_gpu_are_not_compared_with_this_processor(shipped: HardwareProfile) -> None:
    shipped.document["machine"]["device"] = "cuda"
    assert shipped.elsewhere() is None
