"""Role rules of decoders: the module named as a `model_type` holds that family's `ARCHITECTURE`.

A new one is one file: which module gives each operand of a layer's products, and which modules read it.
"""
