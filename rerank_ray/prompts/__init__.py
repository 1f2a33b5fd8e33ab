"""Prompt templates as YAML data, and how a query and its candidates are filled into them."""
