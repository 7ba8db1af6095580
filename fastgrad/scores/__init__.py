"""One-class scores, one per file: how far a sample lies from clean data, and what that means as a p-value.

A higher score is more unusual. Every score is a traceable module (`fitted.Fitted`) with a ``fit`` that takes rows
of clean data; `rows.ScoreRows` makes those rows from a block of features, `conformal` turns scores into p-values.
"""
