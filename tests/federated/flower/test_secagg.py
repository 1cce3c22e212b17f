"""What docs/security.md says of secure aggregation: SecAgg+ does not run with strategies of the Message API."""

import contextlib

import pytest

pytest.importorskip("flwr", reason="needs Flower")

from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.serverapp.strategy import FedAvg


class TwoNodes:
    """A grid with two nodes."""

    def get_node_ids(self):
        return [1, 2]


def test_its_client_side_does_not_take_a_message_of_a_strategy(monkeypatch):
    """If this fails, SecAgg+ may work now: try it, and correct docs/security.md."""
    with contextlib.suppress(ImportError):  # flwr 1.42: of the process that a SuperLink starts
        from flwr.supercore.task_identity import TaskIdentity

        for name in ("_run_id", "_node_id", "_task_id"):
            monkeypatch.setattr(TaskIdentity, name, 1)
    strategy = FedAvg(min_train_nodes=2, min_available_nodes=2)
    arrays = ArrayRecord.from_numpy_ndarrays([])
    message = next(iter(strategy.configure_train(1, arrays, ConfigRecord(), TwoNodes())))
    context = Context(1, 1, {}, RecordDict(), {})
    with pytest.raises(KeyError, match="secaggplus_configs"):
        secaggplus_mod(message, context, lambda message, context: message)


def test_its_server_side_needs_the_context_of_the_earlier_api():
    workflow = SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2)
    with pytest.raises(TypeError, match="LegacyContext"):
        workflow(TwoNodes(), Context(1, 1, {}, RecordDict(), {}))
