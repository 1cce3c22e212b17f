"""Loaded by a site's Python when a test puts this folder on its path: its worker then lies, round by round."""

import sys

if "braidlora.federated.flower.worker" in sys.orig_argv:
    import dataclasses

    import torch

    from braidlora.federated.protocol.wire import pack_message, unpack_update
    from braidlora.federated.simulation import runner

    first = {}

    def changed(update):
        """Round 1 is honest; then NaN, a wrong rank, a huge step, A, base weights, and the update of round 1 again."""
        first.setdefault("update", update)
        tensors, round = dict(update.tensors), update.round
        name = next(iter(tensors))
        if round == 2:
            tensors = {key: tensor * float("nan") for key, tensor in tensors.items()}
        elif round == 3:
            tensors = {key: tensor[:, :2].contiguous() for key, tensor in tensors.items()}
        elif round == 4:
            tensors = {key: 1000 * (1 + tensor) for key, tensor in tensors.items()}
        elif round == 5:
            tensors[name.replace("lora_B", "lora_A")] = torch.zeros(8, 64)
        elif round == 6:
            tensors["base_model.model.lm_head.weight"] = torch.zeros(4, 4)
        elif round == 7:
            return first["update"]
        return dataclasses.replace(update, tensors=tensors)

    honest = runner.Runner.run

    def run(self, job):
        reply = honest(self, job)
        if reply.update is None:
            return reply
        return dataclasses.replace(reply, update=pack_message(changed(unpack_update(reply.update))))

    runner.Runner.run = run
