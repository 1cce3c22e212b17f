"""A Flower App: everything is in the package braidlora."""
