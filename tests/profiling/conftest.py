from __future__ import annotations

import pytest
import torch

from moeless.profiling.run import ProfileOptions, make_plan, profile_model
from moeless.spec import preset


@pytest.fixture(scope="session")
def quick_profile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A profile of the bundled shapes, measured here in small."""
    threads = torch.get_num_threads()
    options = ProfileOptions(ranks=2, quick=True, force=True)
    spec = preset("bundled")
    try:
        return profile_model(spec, make_plan(spec, "cpu", options), options, tmp_path_factory.mktemp("profile"))
    finally:
        torch.set_num_threads(threads)
