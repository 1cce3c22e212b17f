"""What a recipe will need, from configurations alone: parameters, bytes on disk and on the wire, memory.

Called by the command line. For a training recipe it imports models and adapters, and no federated code.
"""
