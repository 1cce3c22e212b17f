"""What the processes of a group do that do not lead it."""

from __future__ import annotations

from braidlora.config import FederatedConfig
from braidlora.errors import Interrupted
from braidlora.federated.site.clients import Clients
from braidlora.federated.site.group import Group
from braidlora.federated.site.host import Host
from braidlora.federated.site.orders import Order


def follow(group: Group, config: FederatedConfig, clients: Clients) -> None:
    """Load the base model and take part in the trainings that the first process orders, until there are no more.

    Raises:
        BraidloraError: the base model cannot be loaded, here or in another process.
    """
    with group.together():
        host = Host(config, clients.label_space, group)
    while (data := group.receive()) is not None:
        order = Order.unpack(data)
        loaded = order.loaded
        try:
            with group.together():
                host.load(loaded.rank, loaded.scaling, loaded.tensors, loaded.trains, loaded.frozen)
            host.train(clients.by_name[order.client], order.round, order.seed, order.optimizer)
        except Interrupted:
            raise
        except Exception:  # the first process reports it; it is the federation's to go on or not
            continue
