"""What a recipe will need, from configurations alone: parameters, bytes on disk and on the wire, memory."""
