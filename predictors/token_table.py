"""Expected experts of each token id in the first layers, for forecasts before any layer has run.

The output of the embedding depends on the token's id alone, so a table by id knows as much as a network on embeddings
could. Ids that training did not contain count as the mean of all.

Axes: M first layers, V token ids seen in training, T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.contracts import FloatArray

#: Occurrences at which an id's own experts weigh as much as the mean of all ids.
SHRINK = 2.0


class TokenTable:
    """A table of load shares by token id.

    Args:
        id_V: token ids, ascending.
        share_MVE: load shares of each id, which sum to 1 over experts; ``mean_ME``: those of any other id.
    """

    def __init__(self, id_V: NDArray[Any], share_MVE: NDArray[Any], mean_ME: NDArray[Any]) -> None:
        self.id_V = np.asarray(id_V, np.int32)
        self.share_MVE, self.mean_ME = share_MVE.astype(np.float16), mean_ME.astype(np.float32)
        if self.share_MVE.shape != (len(self.mean_ME), len(self.id_V), self.mean_ME.shape[1]):
            raise ValueError(f"a table of shape {self.share_MVE.shape} for {len(self.id_V)} ids")

    @classmethod
    def fit(cls, token_T: NDArray[Any], topk_TMK: NDArray[Any], mean_ME: FloatArray) -> TokenTable:
        """Count the experts ``[T, M, K]`` of each id, shrunk towards the mean of all ids."""
        id_V, at_T, count_V = np.unique(token_T, return_inverse=True, return_counts=True)
        layers, top_k = topk_TMK.shape[1:]
        experts = mean_ME.shape[1]
        share = np.empty((layers, len(id_V), experts))
        for layer in range(layers):
            flat = (at_T[:, None] * experts + topk_TMK[:, layer]).ravel()
            seen_VE = np.bincount(flat, minlength=len(id_V) * experts).reshape(-1, experts) / top_k
            share[layer] = (seen_VE + SHRINK * mean_ME[layer]) / (count_V[:, None] + SHRINK)
        return cls(id_V, share, mean_ME)

    def covers(self, target: int) -> bool:
        """Whether the table holds the layer."""
        return 0 <= target < len(self.mean_ME)

    def share(self, token_T: NDArray[Any], target: int) -> FloatArray:
        """Load shares ``[E]`` of those tokens in a layer."""
        if not len(token_T) or not len(self.id_V):
            return np.asarray(self.mean_ME[target], np.float64)
        at_T = np.minimum(np.searchsorted(self.id_V, token_T), len(self.id_V) - 1)
        met_T = self.id_V[at_T] == token_T
        summed_E = self.share_MVE[target, at_T[met_T]].sum(0, dtype=np.float64)
        summed_E += (~met_T).sum() * self.mean_ME[target].astype(np.float64)
        return np.asarray(summed_E / summed_E.sum())

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays by name."""
        return {"token.id": self.id_V, "token.share": self.share_MVE, "token.mean": self.mean_ME}

    @classmethod
    def of(cls, tensors: Any) -> TokenTable | None:
        """The table from :meth:`tensors`; None if they are not there."""
        if "token.id" not in tensors:
            return None
        return cls(tensors["token.id"], tensors["token.share"], tensors["token.mean"])
