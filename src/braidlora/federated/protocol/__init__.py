"""The protocol between a server and its clients: payload, update, a client's step, the server, guard and rules.

No paths, no processes, no printing. Imported by `site`, `simulation` and every other transport.
"""
