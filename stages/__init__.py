"""The science: six stages, the codings, and what touches transformers."""
