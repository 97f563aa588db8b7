"""A site: the courier that has a network, the vault that has the data."""
