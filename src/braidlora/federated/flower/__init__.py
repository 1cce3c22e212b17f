"""The protocol on Flower: its simulation engine on Ray, and its deployment engine between machines.

Needs the extra `fed`. Called by the command line; Flower's programs import `client_app` and `server_app`.
"""
