"""The tests. Looking for garbage after every 700 objects, as Python does, is a tenth of what they take."""

import gc

gc.set_threshold(50_000, 20, 20)
