"""What one site of a federation needs: its rows, its base model, its own state.

Imported by the transport that runs the site; never by `protocol`.
"""
