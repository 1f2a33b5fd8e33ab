"""A small real collection that needs no download."""
