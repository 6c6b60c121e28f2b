"""Artefacts: routing traces that other cells read."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def bundled(params: dict[str, Any], needs: list[Any], folder: Path) -> None:
    """Record the bundled model on bundled prompts.

    Params: ``requests``, ``max_new_tokens``, ``router_inputs`` (a type or None), ``seed``.
    """
    import moeless
    from moeless.traces.generation import Sampling
    from moeless.traces.hf_model import LoadOptions, load_model
    from moeless.traces.recorder import RecordSettings, record
    from moeless.workloads import prompts

    assets = Path(moeless.__file__).parent / "assets" / "model"
    loaded = load_model(str(assets), LoadOptions(device="cpu", dtype="float32"), name="bundled")
    settings = RecordSettings(
        max_new_tokens=params["max_new_tokens"],
        batch_size=16,
        sampling=Sampling(temperature=0.8, seed=params["seed"]),
        router_inputs=params["router_inputs"],
    )
    record(loaded, prompts.load(max_requests=params["requests"], seed=params["seed"]), folder, settings)
