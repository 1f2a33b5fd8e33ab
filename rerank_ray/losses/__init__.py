"""Ranking losses as pure tensor functions: scores and targets [Q, C] with a mask, to one loss a query [Q].

Every loss computes in float32 and ignores masked candidates; the objective is their mean over queries.
"""
