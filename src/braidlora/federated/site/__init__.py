"""What one site of a federation needs: its rows, its base model, its own state.

Called by whatever transport runs the site; never by `protocol`.
"""
