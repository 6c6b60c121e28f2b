"""Ranks of one machine meet on the loopback interface; those of several by an address that the others reach."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from moeless.engine import interfaces
from moeless.engine.interfaces import VARIABLE, choose_interface, outward

ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth1\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0
"""


@pytest.fixture
def routes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "eth1")])
    path = tmp_path / "route"
    path.write_text(ROUTES)
    return path


def address_of(name: str) -> str | None:
    return {"lo": "127.0.0.1", "eth0": "10.0.0.2", "eth1": "172.17.0.2"}[name]


def test_one_machine_uses_the_loopback_interface_whatever_its_name_resolves_to(routes: Path) -> None:
    environment: dict[str, str] = {}
    choose_interface(True, environment)
    assert environment == {VARIABLE: "lo"}


def test_the_user_s_interface_is_kept() -> None:
    environment = {VARIABLE: "ib0"}
    choose_interface(True, environment)
    choose_interface(False, environment)
    assert environment == {VARIABLE: "ib0"}


@pytest.mark.parametrize("own", ["127.0.1.1", None])
def test_a_name_that_nobody_else_reaches_gives_way_to_the_interface_towards_the_others(
    routes: Path, own: str | None
) -> None:
    for here, name in (("10.0.0.2", "eth0"), ("172.17.0.2", "eth1")):
        found = outward("node0", lambda: own, lambda _, here=here: here, address_of, routes)  # type: ignore[misc]
        assert found == name


def test_the_machine_where_all_meet_takes_the_interface_of_its_default_route(routes: Path) -> None:
    assert outward("node0", lambda: "127.0.1.1", lambda _: "127.0.0.1", address_of, routes) == "eth0"
    assert outward("node0", lambda: "127.0.1.1", lambda _: None, address_of, routes / "absent") is None


def test_a_name_that_resolves_to_an_address_is_left_to_gloo(routes: Path) -> None:
    assert outward("node0", lambda: "10.0.0.2", lambda _: "172.17.0.2", address_of, routes) is None


def test_the_kernel_tells_an_interface_s_address() -> None:
    assert interfaces._address_of("no-such-one") is None
    loopback = interfaces.loopback()
    if loopback == "lo":
        assert interfaces._address_of(loopback) in ("127.0.0.1", None)
