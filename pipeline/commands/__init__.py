"""The verbs of `python -m pipeline`: how each command line is read.

What a verb needs is imported when it runs: `--help` loads nothing but the parser.
"""
