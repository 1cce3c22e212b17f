"""Client steps that go wrong, and the log they leave."""

import dataclasses
import json

from braidlora.federated.protocol.client import client_step


def lines(directory):
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def changed(**settings):
    """A step whose update has other terms or tensors."""

    def how(result):
        given = {
            key: value({**result.update.tensors}) if callable(value) else value
            for key, value in settings.items()
        }
        return dataclasses.replace(result, update=dataclasses.replace(result.update, **given))

    return how


def spoiled_step(wrong):
    """`client_step` whose result goes through `how` first, by client: `{name: [(how, rounds), …]}`."""

    def spoiled(host, client, payload, store, **options):
        result = client_step(host, client, payload, store, **options)
        for how, rounds in wrong.get(client.name, []):
            if payload.round in rounds:
                result = how(result)
        return result

    return spoiled
