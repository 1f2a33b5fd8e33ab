"""The whole path on a collection made on the spot: no network, no data file."""
