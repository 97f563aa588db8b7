"""The privacy mathematics: noise, mechanism, accounting. Pure: no Flower, no files."""
