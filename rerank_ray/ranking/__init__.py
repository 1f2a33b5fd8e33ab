"""Ranking methods: generators that yield model calls and return scores. One method a file."""
