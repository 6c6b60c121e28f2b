"""The commands that reproduce the paper on the real thing: 8 GPUs, real weights, real prompts.

Each is the same command line that runs here on stand-ins, with the names of what is out of reach here.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

#: Hub id of each of the paper's models.
MODELS = {
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "phi-3.5-moe": "microsoft/Phi-3.5-MoE-instruct",
    "llama-4-scout": "meta-llama/Llama-4-Scout-17B-16E-Instruct",
}
#: Hub id of each of the paper's prompt sets.
PROMPTS = {"lmsys": "lmsys/lmsys-chat-1m", "sharegpt": "anon8231489123/ShareGPT_Vicuna_unfiltered"}
#: The live engine's host for each; a model without one would be traced for real and served in simulation.
LIVE = {"mixtral-8x7b": "megatron", "phi-3.5-moe": "transformers", "llama-4-scout": "transformers"}


#: Where 48 GB a GPU are too few: in 16 bits, Llama-4-Scout's non-expert weights and one extra copy a layer do not fit.
LARGER = {"llama-4-scout": ("h100x8", 80)}


@dataclass(frozen=True)
class Recipe:
    """What it reproduces, what it needs, and its commands in order."""

    title: str
    needs: str
    commands: tuple[str, ...]

    def arguments(self) -> list[list[str]]:
        """Every command as the words after ``moeless``."""
        return [shlex.split(command)[1:] for command in self.commands]


def paper_model(name: str, ranks: int = 8) -> Recipe:
    """Trace with both prompt sets, fit the predictor, serve live where the engine can, draw everything."""
    traces = {dataset: f"traces/{name}-{dataset}" for dataset in PROMPTS}
    commands = [
        f"moeless trace {MODELS[name]} {PROMPTS[dataset]} --max-requests 1000 --max-new-tokens 256 --router-inputs "
        f"--device-map auto --out {path}"
        for dataset, path in traces.items()
    ]
    cluster, gigabytes = LARGER.get(name, ("a6000x8", 48))
    given = " ".join(f"--trace {path}" for path in traces.values())
    draw = f"moeless reproduce all --full {given} --cluster {cluster}"
    if name in LIVE:
        first = traces["lmsys"]
        commands += [
            f"moeless train-predictor {first} --method layer_aware --distance 1..5 --evaluate --out predictors/{name}",
            f"moeless serve-bench --backend live --ranks {ranks} --device cuda --host {LIVE[name]} "
            f"--model {MODELS[name]} --prompts {PROMPTS['lmsys']} --arrivals azure-like --batching one-second "
            f"--max-requests 1000 --policy static --policy eplb:history --policy moeless:layer_aware:1 "
            f"--predictor predictors/{name} --verify --out live/{name}",
        ]
        draw += f" --live live/{name}"
    weights = "its weights and the prompts from the hub (both data sets and some models ask for a login)"
    return Recipe(f"{name}, real weights", f"{ranks} GPUs of {gigabytes} GB or more, {weights}", (*commands, draw))


def recipes() -> list[Recipe]:
    """All of them, in the order of the document."""
    gpt_oss = Recipe(
        "gpt-oss-20b, real routing",
        "its routing, recorded by another system as an NPZ file (docs/formats.md), or its weights and `moeless trace`; "
        "no GPU for the file",
        (
            "moeless import-trace gpt-oss-20b.npz --from npz --model gpt-oss-20b --out traces/gpt-oss-20b",
            "moeless reproduce all --quick --trace traces/gpt-oss-20b --beside",
        ),
    )
    live = Recipe(
        "the bundled model, live",
        "nothing; 8 processes share what cores there are",
        (
            "moeless reproduce live",
            "moeless serve-bench --backend live --ranks 8 --host megatron --policy static --policy eplb "
            "--policy moeless --policy elastic --verify",
        ),
    )
    return [*(paper_model(name) for name in MODELS), gpt_oss, live]
