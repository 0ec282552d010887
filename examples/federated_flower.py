"""Flower's clients send statistics, its server merges them: the batch norm of all clients' data, which none of them has sent.

Each client's `fit` returns the arrays of a `fastbn.Stats`, and the strategy's `aggregate_fit` merges in place of averaging.
Client and strategy are Flower's own; what a network would carry between them is carried by function calls here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.client import NumPyClient
from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAvg
from flwr.server.strategy.aggregate import aggregate

import fastbn

Array = np.ndarray


class Client(NumPyClient):
    """One that knows the statistics of its own data."""

    def __init__(self, x: Array):
        self.x = x

    def fit(self, parameters: list[Array], config: dict[str, Any]) -> tuple[list[Array], int, dict[str, Any]]:
        """What one round returns; a model's weights would come before these five arrays."""
        return list(fastbn.batch_norm_stats(self.x).to_arrays()), len(self.x), {}


class Merge(FedAvg):
    """Federated averaging would forget how far the clients' means lie apart."""

    def aggregate_fit(self, server_round: int, results: list[Any], failures: list[Any]) -> tuple[Any, dict[str, Any]]:
        """Running statistics of the global model."""
        sent = [fastbn.Stats.from_arrays(parameters_to_ndarrays(result.parameters)) for _, result in results]
        return ndarrays_to_parameters(list(fastbn.Stats.merge(*sent).to_running())), {}


def main() -> None:
    """One round of three clients of different sizes, each from another domain."""
    rng = np.random.default_rng(0)
    data = [rng.normal(mean, std, (n, 64)).astype(np.float32) for n, mean, std in ((900, 3, 2), (100, 8, 1), (17, 0, 5))]
    results = [(None, Client(x).to_client().fit(FitIns(ndarrays_to_parameters([]), {}))) for x in data]
    parameters, _ = Merge().aggregate_fit(1, results, [])
    averaged = aggregate([([x.mean(0), x.var(0, ddof=1)], len(x)) for x in data])
    whole = np.concatenate(data).astype(np.float64)
    for name, (mean, var) in (("merged", parameters_to_ndarrays(parameters)), ("averaged", averaged)):
        off = np.abs(mean - whole.mean(0)).max(), np.abs(var / whole.var(0, ddof=1) - 1).max()
        print(f"{name:>9}: mean off by {off[0]:.1e}, variance by {off[1]:.1e} of it")


if __name__ == "__main__":
    main()
