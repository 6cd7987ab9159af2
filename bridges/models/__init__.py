"""Families of models: one file each, with the translation of its configuration and its table of rules.

`registry` lists them; `tables` has the rows that most share. A new family is a new file and an entry in `BUILT_IN`.
"""
