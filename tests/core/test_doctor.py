"""The doctor looks at what this process may use, and finds no fault in a machine without a home folder."""

from __future__ import annotations

import pytest

from moeless import doctor


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable names a home folder, and the user has no entry in the password file."""

    def nobody(_uid: int) -> None:
        raise KeyError("uid not found")

    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_MODE", "WANDB_API_KEY", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)


@pytest.mark.usefixtures("homeless")
def test_no_home_is_no_fault_of_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    check = doctor._attempt("W&B", doctor._wandb)
    assert check.state == "ok"
    assert "offline" in check.finding


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"WANDB_API_KEY": "k"}, "logged in"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_DISABLED": "1"}, "disabled"),
    ],
)
def test_the_doctor_says_what_a_run_would_do_with_wandb(
    homeless: None, monkeypatch: pytest.MonkeyPatch, tmp_path, variables: dict[str, str], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert word in doctor._wandb().finding


def test_a_container_s_limits_are_shown_not_the_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("memory_bytes", 3 * 2**29), ("cores", 2), ("processor_quota", 2.5), ("affinity", 64)):
        monkeypatch.setattr(doctor, name, lambda value=value: value)
    check = doctor._machine()
    assert check.state == "note"
    assert "2 cores (a quota of 2.5 of 64), 1.5 GiB memory" in check.finding
