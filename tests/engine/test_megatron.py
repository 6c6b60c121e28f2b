"""The Megatron host and releases of megatron-core: those that were tested, those that were not, those to come."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeless import doctor
from moeless.engine import bench, hosts
from moeless.engine.flat import KVCache
from moeless.engine.hosts import megatron_release
from moeless.errors import UserError


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Let package metadata name another release of megatron-core, or none."""
    true = metadata.version

    def put(release: str | None) -> None:
        def version(name: str) -> str:
            if name != "megatron-core":
                return true(name)
            if release is None:
                raise metadata.PackageNotFoundError(name)
            return release

        monkeypatch.setattr(metadata, "version", version)

    return put


def checked() -> doctor.Check:
    (check,) = (check for check in doctor.examine() if check.name == "megatron-core")
    return check


def test_doctor_notes_a_release_that_was_not_tested_and_names_those_that_were(install: Callable[..., None]) -> None:
    install("0.99.1")
    check = checked()
    assert check.state == "note"
    assert all(release in check.finding for release in ("0.99.1", "0.16.1", "0.19.2"))


@pytest.mark.parametrize("release", megatron_release.TESTED)
def test_doctor_is_content_with_a_tested_release(install: Callable[..., None], release: str) -> None:
    install(release)
    assert checked() == doctor.Check("megatron-core", "ok", release)


def test_doctor_says_that_megatron_is_absent(install: Callable[..., None]) -> None:
    install(None)
    assert checked().state == "bad"
    assert hosts.remarks("megatron") == []


def test_a_live_run_with_an_untested_release_warns_once_and_goes_on(install: Callable[..., None], cli: Any) -> None:
    install("0.99.1")
    asked = ["serve-bench", "--backend", "live", "--max-requests", "2", "--policy", "static", "--dry-run"]
    status, _, err = cli(*asked, "--host", "megatron")
    said = " ".join(err.split())
    assert status == 0
    assert said.count("tested with megatron-core 0.16.1 and 0.19.2, not with 0.99.1") == 1
    assert "megatron-core" not in cli(*asked, "--host", "transformers")[2]


def test_what_is_said_of_an_untested_release_is_kept_with_the_run(install: Callable[..., None]) -> None:
    install("0.99.1")
    made = bench.LiveBench(bench.LiveConfig(policies=("static",), host="megatron"))
    assert [remark for remark in made.remarks if "0.99.1" in remark] == hosts.remarks("megatron")


def test_a_host_whose_library_cannot_be_imported_is_refused_in_a_sentence(install: Callable[..., None]) -> None:
    install("0.99.1")
    registry = type(hosts.HOSTS)("host", "moeless.hosts", {"megatron": "megatron_of_the_future.core:Host"})
    with pytest.raises(
        UserError, match=r"host 'megatron' cannot be loaded .*megatron_of_the_future.*not with 0\.99\.1"
    ):
        registry.get("megatron")


def test_the_moe_layer_takes_whatever_a_release_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from moeless.engine.hosts import megatron

    class Router(torch.nn.Module):
        def __init__(self, config: Any, pg_collection: Any, is_mtp_layer: bool) -> None:
            super().__init__()
            self.given = (pg_collection, is_mtp_layer)

    monkeypatch.setattr(megatron, "TopKRouter", Router)
    monkeypatch.setattr(megatron, "DeviceRouter", Router)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    groups = object()
    layer = megatron.ElasticMoELayer(
        config=config, pg_collection=groups, is_mtp_layer=True, name="decoder.layers.0.mlp", of_the_future=1
    )
    assert layer.router.given == (groups, True)


@pytest.mark.parametrize("configured", [False, True])
def test_the_context_takes_its_settings_as_its_base_does(monkeypatch: pytest.MonkeyPatch, configured: bool) -> None:
    from moeless.engine.hosts import megatron_context

    def by_name(self: Any, materialize_only_last_token_logits: bool) -> None:
        self.last_only = materialize_only_last_token_logits

    def by_config(self: Any, inference_config: Any) -> None:
        self.last_only = inference_config.materialize_only_last_token_logits

    base = megatron_context.BaseInferenceContext
    monkeypatch.setattr(base, "__init__", by_config if configured else by_name)
    monkeypatch.setattr(megatron_context, "InferenceConfig", SimpleNamespace if configured else None)
    assert megatron_context.FlatContext(KVCache(), 16, None).last_only is False


def test_a_release_that_asks_whether_it_infers_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    from moeless.engine.hosts import megatron_context

    seen: list[str] = []

    @contextmanager
    def active() -> Any:
        seen.append("on")
        yield
        seen.append("off")

    monkeypatch.setattr(
        megatron_context.inference_utils, "InferenceMode", SimpleNamespace(active=active), raising=False
    )
    with megatron_context.inference():
        seen.append("step")
    assert seen == ["on", "step", "off"]
    monkeypatch.delattr(megatron_context.inference_utils, "InferenceMode")
    with megatron_context.inference():
        seen.append("step")
    assert seen == ["on", "step", "off", "step"]


def test_only_what_megatron_announces_of_the_host_s_own_choices_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    megatron_release.quiet()
    for name, beginning in megatron_release.ANNOUNCEMENTS.items():
        logging.getLogger(name).warning("%s, and so on", beginning)
        logging.getLogger(name).warning("something else of %s", name)
    assert [record.message for record in caplog.records] == [
        f"something else of {name}" for name in megatron_release.ANNOUNCEMENTS
    ]
