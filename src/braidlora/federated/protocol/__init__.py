"""What two parties of a federation say to each other: payload, update, a client's step, the server, guard and rules.

No paths, no processes, no printing. Called by `site`, `simulation` and every other transport.
"""
