"""The shapes of a model from what a user names it by: a preset, a file, a configuration folder, or numbers."""

from __future__ import annotations

from pathlib import Path

from moeless.errors import UserError
from moeless.files import read_json
from moeless.spec import PRESETS, Attention, MoESpec


def resolve_spec(model: str) -> MoESpec:
    """A preset's name, a trace folder, a spec in JSON, or a folder with a Transformers ``config.json``.

    Raises:
        UserError: it is none of them.
    """
    if model in PRESETS:
        return PRESETS[model]
    path = Path(model).expanduser()
    if not path.exists():
        known = ", ".join(sorted(PRESETS))
        raise UserError(f"no model is called {model!r}: give a preset ({known}), a spec in JSON or a model folder")
    if path.is_file():
        data = read_json(path)
        if isinstance(data, dict) and "model_type" in data:
            return _from_transformers(path.parent)
        return MoESpec.from_json(data)
    if (path / "trace.json").exists():
        from moeless.traces.info import TraceInfo

        return TraceInfo.read(path).spec
    if (path / "config.json").exists():
        return _from_transformers(path)
    raise UserError(f"{path} holds no config.json, so it is not a model folder")


def _from_transformers(folder: Path) -> MoESpec:
    from moeless.traces.hf_spec import spec_of_folder

    return spec_of_folder(folder)


def spec_from_numbers(
    *, layers: int, experts: int, top_k: int, hidden_size: int, expert_size: int, name: str = "custom"
) -> MoESpec:
    """A spec of a model of which only the routed experts' shapes are known; attention counts one head of width H.

    Raises:
        UserError: a number is out of range.
    """
    return MoESpec(
        name=name,
        hidden_size=hidden_size,
        num_layers=layers,
        moe_layers=tuple(range(layers)),
        num_experts=experts,
        top_k=top_k,
        expert_intermediate_size=expert_size,
        attention=Attention(heads=1, kv_heads=1, head_dim=hidden_size),
        vocab_size=1,
        source="numbers given on import; attention and vocabulary are not the model's",
    )
