"""What tests of several rooms share: a tiny base, recipes over it, runs in child processes, kills, and datasets."""
